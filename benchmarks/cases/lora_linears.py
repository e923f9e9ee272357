"""Query, key and value of one x, as LoRA linear layers that read it once, beside the same layers one by one.

W is [N, K] in each of the three. bfloat16 on a GPU, float32 on a CPU. The backward has gradients of x and of every A
and B.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks.case import Case, Check, Claim, Provider
from benchmarks.cases import lora_linear
from benchmarks.cases.lora_linear import SCALING, forward
from benchmarks.rounding import within_rounding
from benchmarks.shapes import SMALL_LINEAR

SHAPES = (SMALL_LINEAR,)

LAYERS = 3


def cases(shape: dict[str, int], device: str) -> Iterator[Case]:
    """Yield the forward and forward with backward for M tokens, three W [N, K] and rank R."""
    import torch

    import lora_core as lc
    from lora_core.ops.lora_linears import Layer, lora_linears

    m, n, k, r = (shape[name] for name in "MNKR")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    x = torch.randn(m, k, device=device).to(dtype)
    weights, lora_as, lora_bs = (
        [torch.randn(*size, device=device).to(dtype) for _ in range(LAYERS)] for size in ((n, k), (r, k), (n, r))
    )
    leaves = [t.requires_grad_() for t in (x, *lora_as, *lora_bs)]

    def together(x: Any, *pairs: Any) -> Any:
        pieces = zip(weights, pairs[:LAYERS], pairs[LAYERS:], strict=True)
        return lora_linears(x, [Layer(w, None, a, b, SCALING) for w, a, b in pieces])

    def alone(layer: Callable[..., Any], x: Any, *pairs: Any) -> Any:
        return [layer(x, w, a, b) for w, a, b in zip(weights, pairs[:LAYERS], pairs[LAYERS:], strict=True)]

    models: dict[str, Callable[..., Any]] = {
        "lora_core": together,
        "lora_linear": partial(alone, lambda x, w, a, b: lc.lora_linear(x, w, None, a, b, SCALING)),
        "torch": partial(alone, _plain),
    }
    d_ys = [torch.randn(m, n, device=device).to(dtype) for _ in range(LAYERS)]
    runs = {
        "fwd": lambda model: forward(model, leaves),
        "fwdbwd": lambda model: torch.autograd.grad(model(*leaves), leaves, d_ys),
    }
    for mode, run in runs.items():
        moved = x.numel() + LAYERS * (weights[0].numel() + m * n)
        yield Case(
            op="lora_linears",
            mode=mode,
            shape=shape,
            dtype=str(dtype).removeprefix("torch."),
            block_size=None,
            providers=[Provider(name, partial(run, model)) for name, model in models.items()],
            check=lambda name, run=run: _check(run(models[name]), x, weights, lora_as, lora_bs, d_ys),
            bytes_moved=dtype.itemsize * moved if mode == "fwd" else None,
            flops=2 * LAYERS * m * (n * k + r * (n + k)) * (1 if mode == "fwd" else 2),
            claims=(Claim(against="lora_linear", no_slower=True), Claim(against="torch", no_slower=True)),
            note=f"{LAYERS} layers",
        )


def _plain(x: Any, weight: Any, lora_a: Any, lora_b: Any) -> Any:
    from torch.nn.functional import linear

    return linear(x, weight) + linear(linear(x, lora_a), lora_b) * SCALING


def _check(result: Any, x: Any, weights: Any, lora_as: Any, lora_bs: Any, d_ys: Any) -> Check:
    """Compare every y, or the gradients of x and of every pair, with float64; the worst of them counts."""
    import torch

    operands = [(x, w, torch.zeros_like(w[:, 0]), a, b) for w, a, b in zip(weights, lora_as, lora_bs, strict=True)]
    if not isinstance(result, tuple):
        checks = [lora_linear.check(y, own, None) for y, own in zip(result, operands, strict=True)]
        return max(checks, key=lambda check: (not check.passed, check.max_error))
    found = [
        [
            lora_linear.gradients(*(t.abs() if absolute else t for t in (t.detach().double() for t in (*own, d_y))))
            for own, d_y in zip(operands, d_ys, strict=True)
        ]
        for absolute in (False, True)
    ]
    truths, magnitudes = (
        [sum(d_x for d_x, _, _ in each), *(a for _, a, _ in each), *(b for _, _, b in each)] for each in found
    )
    products = LAYERS * (len(x) + d_ys[0].shape[1]) + x.shape[1]
    checks = [
        within_rounding(*each, products, roundings=4 + LAYERS) for each in zip(result, truths, magnitudes, strict=True)
    ]
    return max(checks, key=lambda check: (not check.passed, check.max_error))
