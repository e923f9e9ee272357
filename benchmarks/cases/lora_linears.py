"""Query, key and value of one x, as LoRA linear layers that read it once, beside the same layers one by one.

W is [N, K] in each of the three; their outputs are put side by side. Forward, backward with gradients of x and of every
A and B, and both. bfloat16 on a GPU, float32 on a CPU. One by one they are this library's ("lora_core one by one"), the
formula in plain PyTorch as written ("torch") and, all three as one, under torch.compile ("compiled").
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks import modes
from benchmarks.case import Case, Claim
from benchmarks.cases.lora_linear import SCALING, flops, moved_beside_weights
from benchmarks.modes import Work
from benchmarks.peers import providers
from benchmarks.shapes import SMALL_LINEAR

SHAPES = (SMALL_LINEAR,)
GPU_SHAPES = tuple({"M": m, "N": 4096, "K": 4096, "R": 16} for m in (1, 16, 512, 4096, 8192))

LAYERS = 3
# a path of this library, and none of its rivals
ONE_BY_ONE = "lora_core one by one"


def cases(shape: dict[str, int], device: str) -> Iterator[Case]:
    """Yield one comparison a mode, for M tokens, three W [N, K] and rank R."""
    import torch

    import lora_core as lc
    from lora_core.ops.layer import Layer
    from lora_core.ops.lora_linears import lora_linears
    from lora_core.reference import lora as reference

    m, n, k, r = (shape[name] for name in "MNKR")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    x = torch.randn(m, k, device=device).to(dtype)
    weights, lora_as, lora_bs = (
        [torch.randn(*size, device=device).to(dtype) for _ in range(LAYERS)] for size in ((n, k), (r, k), (n, r))
    )
    leaves = tuple(t.requires_grad_() for t in (x, *lora_as, *lora_bs))

    def together(x: Any, *pairs: Any) -> Any:
        pieces = zip(weights, pairs[:LAYERS], pairs[LAYERS:], strict=True)
        return torch.cat(lora_linears(x, [Layer(w, None, a, b, SCALING) for w, a, b in pieces]), 1)

    def alone(layer: Callable[..., Any], x: Any, *pairs: Any) -> Any:
        pieces = zip(weights, pairs[:LAYERS], pairs[LAYERS:], strict=True)
        return torch.cat([layer(x, w, a, b) for w, a, b in pieces], 1)

    written = partial(alone, lambda x, w, a, b: reference.lora_linear(x, w, None, a, b, SCALING))
    models: dict[str, Callable[..., Any]] = {
        "lora_core": together,
        ONE_BY_ONE: partial(alone, lambda x, w, a, b: lc.lora_linear(x, w, None, a, b, SCALING)),
        "torch": written,
    }
    layers, missing = providers(models, {"compiled": modes.compiled_peer(written, device)})
    operands = (x, *weights, *leaves[1:])
    works = {name: Work(layer, leaves, _truth, operands, LAYERS * (m + n) + k + r) for name, layer in layers.items()}
    d_ys = torch.randn(m, LAYERS * n, device=device).to(dtype)
    for mode in modes.MODES:
        moved = LAYERS * n * k + moved_beside_weights(shape, mode, LAYERS)
        yield Case(
            op="lora_linears",
            mode=mode,
            shape=shape,
            dtype=str(dtype).removeprefix("torch."),
            block_size=None,
            providers=modes.providers(works, mode, d_ys),
            check=modes.check(works, mode, d_ys),
            bytes_moved=dtype.itemsize * moved,
            flops=LAYERS * flops(shape, mode),
            claims=tuple(Claim(against=name, no_slower=True) for name in (ONE_BY_ONE, "torch")),
            note=f"{LAYERS} layers",
            missing=missing,
        )


def _truth(x: Any, *rest: Any) -> Any:
    """Return every y side by side, or with d_y the gradients of x and of every A and B."""
    import torch

    *tensors, d_ys = rest
    weights, lora_as, lora_bs = (tensors[i : i + LAYERS] for i in range(0, 3 * LAYERS, LAYERS))
    d_each = [None] * LAYERS if d_ys is None else d_ys.chunk(LAYERS, 1)
    each = [
        modes.lora_truth(x, w, None, a, b, SCALING, d_y)
        for w, a, b, d_y in zip(weights, lora_as, lora_bs, d_each, strict=True)
    ]
    if d_ys is None:
        return torch.cat(each, 1)
    return sum(d_x for d_x, _, _ in each), *(a for _, a, _ in each), *(b for _, _, b in each)
