"""A LoRA linear layer in training with dropout before A: forward, backward with gradients of x, A and B, and both.

bfloat16 on a GPU, float32 on a CPU. This library's layer, fused, which hashes its mask and makes it anew in the
backward, beside PEFT's and the formula in plain PyTorch as written ("torch"), which draw theirs and keep it, and for
scale the frozen product alone ("matmul"). All start from one seed, and each is compared with the truth under its own
mask; under torch.compile no seed says what the mask is, so the compiled formula is no rival here.
"""

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import modes
from benchmarks.case import Case, Claim
from benchmarks.cases.lora_linear import SCALING, bias_moved, flops, linear_of, moved_beside_weights, on_x, peft_layer
from benchmarks.modes import Work
from benchmarks.peers import Peer, providers
from benchmarks.shapes import SMALL_LINEAR

SHAPES = (SMALL_LINEAR, {**SMALL_LINEAR, "N": 1408})
GPU_SHAPES = tuple({"M": 4096, "N": n, "K": k, "R": 16} for n, k in ((4096, 4096), (14336, 4096), (4096, 14336)))

DROPOUT = 0.1
SEED = 0


def cases(shape: dict[str, int], device: str) -> Iterator[Case]:
    """Yield one comparison a mode, for M tokens, W [N, K] and rank R."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    m, n, k, r = (shape[name] for name in "MNKR")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(SEED)
    x, weight, bias, lora_a, lora_b, d_y = (
        torch.randn(*size, device=device).to(dtype) for size in ((m, k), (n, k), (n,), (r, k), (n, r), (m, n))
    )
    pair = (nn.Parameter(lora_a), nn.Parameter(lora_b))
    leaves = (x.requires_grad_(), *pair)

    def written(x: Any, a: Any, b: Any) -> Any:
        return F.linear(x, weight, bias) + SCALING * F.linear(F.linear(F.dropout(x, DROPOUT), a), b)

    ours: dict[str, Callable[..., Any]] = {
        "lora_core": _from_seed(_own_layer(linear_of(weight, bias), pair)),
        "torch": _from_seed(written),
    }
    peft = Peer(("peft",), lambda: _from_seed(on_x(peft_layer(linear_of(weight, bias), pair, SCALING, DROPOUT))))
    layers, missing = providers(ours, {"peft": peft})
    kept = {name: _own_mask(x) if name == "lora_core" else _drawn_mask(x) for name in layers}
    works = {
        name: Work(layer, leaves, _truth, (x, weight, bias, *pair, kept[name], SCALING), m + n + k + r)
        for name, layer in layers.items()
    }
    works["matmul"] = Work(lambda x: F.linear(x, weight, bias), (x,), modes.linear_truth, (x, weight, bias), n + k)
    for mode in modes.MODES:
        yield Case(
            op="lora_dropout",
            mode=mode,
            shape=shape,
            dtype=str(dtype).removeprefix("torch."),
            block_size=None,
            providers=modes.providers(works, mode, d_y),
            check=modes.check(works, mode, d_y),
            bytes_moved=dtype.itemsize * (n * k + moved_beside_weights(shape, mode) + bias_moved(shape, mode)),
            flops=flops(shape, mode),
            # a backward alone does without the mask that others have kept
            claims=tuple(Claim(against=name, no_slower=True) for name in ("torch", "peft") if mode == "fwdbwd"),
            note=f"bias, dropout {DROPOUT:g}",
            missing=missing,
        )


def _from_seed(layer: Callable[..., Any]) -> Callable[..., Any]:
    """Return a layer that drops the same elements at every call."""
    import torch

    def run(*leaves: Any) -> Any:
        torch.manual_seed(SEED)
        return layer(*leaves)

    return run


def _own_layer(base: Any, pair: tuple[Any, Any]) -> Callable[..., Any]:
    """Return this library's layer on a linear one, with these two parameters as A and B, fused."""
    from torch import nn

    import lora_core as lc

    rank = len(pair[0])
    model = nn.Sequential(base)
    lc.add_adapter(model, lc.LoraConfig(r=rank, lora_alpha=SCALING * rank, lora_dropout=DROPOUT, target_modules=["0"]))
    model[0].lora_a["default"], model[0].lora_b["default"] = pair
    lc.fuse(model)
    return on_x(model[0])


def _own_mask(x: Any) -> Any:
    """Return keep / (1 - p) as this library drops."""
    import torch

    from lora_core.layers.dropout import fresh_seed
    from lora_core.reference.dropout import keep_mask

    torch.manual_seed(SEED)
    return keep_mask(fresh_seed(x.device), *x.shape, DROPOUT).double() / (1 - DROPOUT)


def _drawn_mask(x: Any) -> Any:
    """Return keep / (1 - p) as PyTorch drops."""
    import torch

    torch.manual_seed(SEED)
    return (torch.nn.functional.dropout(torch.ones_like(x), DROPOUT) != 0).double() / (1 - DROPOUT)


def _truth(x: Any, weight: Any, bias: Any, lora_a: Any, lora_b: Any, kept: Any, scaling: float, d_y: Any) -> Any:
    """Return y of the layer, or with d_y the gradients of x, A and B."""
    dropped = x * kept
    hidden = dropped @ lora_a.T
    if d_y is None:
        return x @ weight.T + bias + scaling * hidden @ lora_b.T
    d_s = scaling * d_y @ lora_b
    return d_y @ weight + kept * (d_s @ lora_a), d_s.T @ dropped, scaling * d_y.T @ hidden
