"""A LoRA linear layer, forward alone and with its backward, beside the same as PyTorch's own operations compute it.

bfloat16 on a GPU, float32 on a CPU. The backward has gradients of x, A and B.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks.case import Case, Check, Claim, Provider
from benchmarks.rounding import within_rounding
from benchmarks.shapes import SMALL_LINEAR

SHAPES = (SMALL_LINEAR,)

SCALING = 2.0


def cases(shape: dict[str, int], device: str) -> Iterator[Case]:
    """Yield the forward and forward with backward for M tokens, W [N, K] and rank R."""
    import torch

    import lora_core as lc

    m, n, k, r = (shape[name] for name in "MNKR")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    x, weight, bias, lora_a, lora_b = (
        torch.randn(*size, device=device).to(dtype) for size in ((m, k), (n, k), (n,), (r, k), (n, r))
    )
    leaves = [t.requires_grad_() for t in (x, lora_a, lora_b)]
    layers: dict[str, Callable[..., Any]] = {
        "lora_core": lambda x, a, b: lc.lora_linear(x, weight, bias, a, b, SCALING),
        "torch": lambda x, a, b: _plain(x, weight, bias, a, b),
    }
    d_y = torch.randn(m, n, device=device).to(dtype)
    runs = {
        "fwd": lambda layer: forward(layer, leaves),
        "fwdbwd": lambda layer: torch.autograd.grad(layer(*leaves), leaves, d_y),
    }
    for mode, run in runs.items():
        moved = x.numel() + weight.numel() + m * n
        yield Case(
            op="lora_linear",
            mode=mode,
            shape=shape,
            dtype=str(dtype).removeprefix("torch."),
            block_size=None,
            providers=[Provider(name, partial(run, layer)) for name, layer in layers.items()],
            check=lambda name, run=run: check(run(layers[name]), (x, weight, bias, lora_a, lora_b), d_y),
            bytes_moved=dtype.itemsize * moved if mode == "fwd" else None,
            flops=2 * m * (n * k + r * (n + k)) * (1 if mode == "fwd" else 2),
            claims=(Claim(against="torch", no_slower=True, no_larger=True),),
            note="bias",
        )


def _plain(x: Any, weight: Any, bias: Any, lora_a: Any, lora_b: Any) -> Any:
    from torch.nn.functional import linear

    return linear(x, weight, bias) + linear(linear(x, lora_a), lora_b) * SCALING


def forward(layer: Callable[..., Any], leaves: list[Any]) -> Any:
    import torch

    with torch.no_grad():
        return layer(*leaves)


def check(result: Any, operands: tuple[Any, ...], d_y: Any) -> Check:
    """Compare y, or the gradients of x, A and B, with float64; the worst of them counts."""
    wide = [t.detach().double() for t in operands]
    if not isinstance(result, tuple):
        truth, magnitude = (_plain(*(t.abs() if absolute else t for t in wide)) for absolute in (False, True))
        return within_rounding(result, truth, magnitude, sum(operands[3].shape) + 2, roundings=4)
    truths, magnitudes = (
        gradients(*(t.abs() if absolute else t for t in (*wide, d_y.double()))) for absolute in (False, True)
    )
    products = len(d_y) + d_y.shape[1] + wide[0].shape[1]
    checks = [within_rounding(*found, products, roundings=4) for found in zip(result, truths, magnitudes, strict=True)]
    return max(checks, key=lambda check: (not check.passed, check.max_error))


def gradients(x: Any, weight: Any, bias: Any, lora_a: Any, lora_b: Any, d_y: Any) -> tuple[Any, Any, Any]:
    """Return the gradients of x, A and B for G = d_y, in whatever dtype the operands have."""
    d_s = SCALING * d_y @ lora_b
    return d_y @ weight + d_s @ lora_a, d_s.T @ x, SCALING * d_y.T @ (x @ lora_a.T)
