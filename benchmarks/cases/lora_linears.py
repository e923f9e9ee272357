"""Query, key and value of one x, as LoRA linear layers that read it once, beside the same layers one by one.

W is [N, K] in each of the three; their outputs are put side by side. bfloat16 on a GPU, float32 on a CPU. The backward
has gradients of x and of every A and B.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks import modes
from benchmarks.case import Case, Claim
from benchmarks.cases.lora_linear import SCALING, flops
from benchmarks.modes import Work
from benchmarks.shapes import SMALL_LINEAR

SHAPES = (SMALL_LINEAR,)
GPU_SHAPES = tuple({"M": m, "N": 4096, "K": 4096, "R": 16} for m in (1, 16, 512, 4096, 8192))

LAYERS = 3


def cases(shape: dict[str, int], device: str) -> Iterator[Case]:
    """Yield the forward and forward with backward for M tokens, three W [N, K] and rank R."""
    import torch

    import lora_core as lc
    from lora_core.ops.lora_linears import Layer, lora_linears
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

    models: dict[str, Callable[..., Any]] = {
        "lora_core": together,
        "lora_linear": partial(alone, lambda x, w, a, b: lc.lora_linear(x, w, None, a, b, SCALING)),
        "torch": partial(alone, lambda x, w, a, b: reference.lora_linear(x, w, None, a, b, SCALING)),
    }
    operands = (x, *weights, *leaves[1:])
    works = {name: Work(model, leaves, _truth, operands, LAYERS * (m + n) + k + r) for name, model in models.items()}
    d_ys = torch.randn(m, LAYERS * n, device=device).to(dtype)
    for mode in modes.MODES:
        moved = x.numel() + LAYERS * (weights[0].numel() + m * n)
        yield Case(
            op="lora_linears",
            mode=mode,
            shape=shape,
            dtype=str(dtype).removeprefix("torch."),
            block_size=None,
            providers=modes.providers(works, mode, d_ys),
            check=modes.check(works, mode, d_ys),
            bytes_moved=dtype.itemsize * moved * (2 if mode == "fwdbwd" else 1),
            flops=LAYERS * flops(shape, mode),
            claims=(Claim(against="lora_linear", no_slower=True), Claim(against="torch", no_slower=True)),
            note=f"{LAYERS} layers",
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
