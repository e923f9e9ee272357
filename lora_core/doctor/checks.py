"""Every operation on small inputs beside its reference: codes to the bit, products within a rounding bound."""

from collections.abc import Callable

import torch
from torch import Tensor

from lora_core.ops.absmax_dequantize import absmax_dequantize
from lora_core.ops.absmax_quantize import absmax_quantize
from lora_core.ops.dora_norm import dora_norm
from lora_core.ops.grouped_lora import grouped_lora
from lora_core.ops.layer import Layer
from lora_core.ops.lora_linear import lora_linear
from lora_core.ops.lora_linears import lora_linears
from lora_core.ops.nf4_dequantize import nf4_dequantize
from lora_core.ops.nf4_lora_linear import nf4_lora_linear
from lora_core.ops.nf4_quantize import nf4_quantize
from lora_core.ops.packed import Packed
from lora_core.quant import QuantizedWeight, double, quantize_nf4
from lora_core.reference import dora, grouped, lora, nf4

# odd on purpose: blocks straddle rows and the last is short
M, N, K, R = 5, 33, 70, 3


class Disagreement(Exception):
    """An operation's result is not the reference's."""


def _operands(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x, weight, bias, a, b = (
        torch.randn(s, generator=g).to(device, dtype) for s in ((M, K), (N, K), (N,), (R, K), (N, R))
    )
    return x, weight, bias, a, b


def _check_quantize(device: str) -> str:
    for dtype in (torch.float32, torch.bfloat16):
        weight = _operands(device, dtype)[1]
        for got, want in zip(nf4_quantize(weight, 64), nf4.nf4_quantize(weight, 64), strict=True):
            _require(torch.equal(got, want), f"codes or scales of a {dtype} weight differ")
    return "codes and scales equal"


def _check_dequantize(device: str) -> str:
    weight = _operands(device, torch.float32)[1]
    for double_quant in (False, True):
        q = quantize_nf4(weight, 64, double_quant)
        packed = (q.codes, q.absmax, q.nested_absmax, q.nested_offset, q.shape)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            same = torch.equal(nf4_dequantize(*packed, dtype, 64), nf4.nf4_dequantize(*packed, dtype, 64))
            _require(same, f"{dtype} weights differ, double quantisation {double_quant}")
    return "equal to the bit, three dtypes"


def _scales(device: str) -> tuple[Tensor, Tensor]:
    absmax = _operands(device, torch.float32)[1].abs().flatten()
    return absmax, double.absmax_offset(absmax)


def _check_absmax_quantize(device: str) -> str:
    absmax, offset = _scales(device)
    for got, want in zip(absmax_quantize(absmax, offset), double.quantize_absmax(absmax, offset), strict=True):
        _require(torch.equal(got, want), "codes or second-level scales differ")
    return "codes and scales equal"


def _check_absmax_dequantize(device: str) -> str:
    absmax, offset = _scales(device)
    nested = (*double.quantize_absmax(absmax, offset), offset)
    _require(torch.equal(absmax_dequantize(*nested), double.dequantize_absmax(*nested)), "scales differ")
    return "equal to the bit"


def _check_linear(device: str) -> str:
    args = _operands(device, torch.float32)
    _require_close(lora_linear(*args, 0.5), args, args[1])
    return "within rounding"


def _check_nf4_linear(device: str) -> str:
    x, weight, bias, a, b = _operands(device, torch.float32)
    q: QuantizedWeight = quantize_nf4(weight)
    _require_close(nf4_lora_linear(x, q, bias, a, b, 0.5), (x, weight, bias, a, b), q.dequantize())
    return "within rounding"


def _check_backward(device: str) -> str:
    x, weight, bias, a, b = _operands(device, torch.float32)
    return _check_gradients(lambda x, a, b: lora_linear(x, weight, bias, a, b, 0.5), x, weight, a, b)


def _check_nf4_backward(device: str) -> str:
    x, weight, bias, a, b = _operands(device, torch.float32)
    q = quantize_nf4(weight)
    return _check_gradients(lambda x, a, b: nf4_lora_linear(x, q, bias, a, b, 0.5), x, q.dequantize(), a, b)


def _check_linears(device: str) -> str:
    args = _operands(device, torch.float32)
    q = quantize_nf4(args[1])
    for y, weight in zip(_linears(args, q, *args[3:]), (args[1], q.dequantize()), strict=True):
        _require_close(y, args, weight)
    return "a dense and an NF4 layer, within rounding"


def _check_linears_backward(device: str) -> str:
    args = _operands(device, torch.float32)
    x, weight, _, a, b = args
    q = quantize_nf4(weight)
    # two layers with one pair: the gradients of both weights' sum, the pair's twice
    both = weight + q.dequantize()
    return _check_gradients(
        lambda x, a, b: torch.stack(_linears((x, *args[1:]), q, a, b)).sum(0), x, both, a, b, layers=2
    )


def _linears(args: tuple[Tensor, ...], q: QuantizedWeight, a: Tensor, b: Tensor) -> list[Tensor]:
    x, weight, bias, _, _ = args
    return lora_linears(x, [Layer(w, bias, a, b, 0.5) for w in (weight, Packed.of(q))])


def _check_gradients(
    run: Callable[..., Tensor], x: Tensor, weight: Tensor, a: Tensor, b: Tensor, layers: int = 1
) -> str:
    """Compare d_x, d_lora_a and d_lora_b of the sum of y with the reference in float64.

    Args:
        run: returns y of x, A and B; of several layers their sum.
        weight: W, or the sum of several layers'.
        layers: how many layers have A and B.
    """
    leaves = [t.requires_grad_() for t in (x, a, b)]
    got = torch.autograd.grad(run(*leaves).sum(), leaves)
    scaling = 0.5 * layers
    truth, magnitude = (_gradients(scaling, *(wide(t) for t in (x, weight, a, b))) for wide in (_double, _magnitude))
    for name, g, t, m in zip(("x", "lora_a", "lora_b"), got, truth, magnitude, strict=True):
        _require(_within(g, t, m, M + N + K + R), f"d_{name} is outside the rounding bound")
    return "gradients within rounding"


def _gradients(scaling: float, x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    d_y = x.new_ones(len(x), len(weight))
    grads = lora.backward(d_y, x, weight, a, b, x @ a.T, scaling, 0.0, None, (True, False, False, True, True))
    return tuple(g for g in grads if g is not None)


def _check_dora_norm(device: str) -> str:
    _, weight, _, a, b = _operands(device, torch.float32)
    for w in (weight, quantize_nf4(weight)):
        dense = w if isinstance(w, Tensor) else w.dequantize()
        truth, bound = (dora.dora_norm_dense(wide(dense), wide(a), wide(b), 0.5) for wide in (_double, _magnitude))
        # of squares, as the root of a small sum magnifies its error
        _require(_within(dora_norm(w, a, b, 0.5).double().square(), truth**2, bound**2, K + 2 * R), "norms differ")
    return "within rounding"


def _check_grouped(device: str) -> str:
    x, _, _, a, b = _operands(device, torch.float32)
    adapter = torch.tensor([1, -1, 0, 1, 0], device=device)
    scaling, ranks = torch.tensor([0.5, 2.0], device=device), [1, 2]
    got = grouped_lora(x, a, b, ranks, adapter, scaling)
    truth, magnitude = (
        grouped.forward(wide(x), None, wide(a), wide(b), ranks, adapter, wide(scaling))[0]
        for wide in (_double, _magnitude)
    )
    _require(_within(got, truth, magnitude, K + R), "outside the rounding bound")
    return "within rounding"


def _check_grouped_backward(device: str) -> str:
    x, _, _, a, b = _operands(device, torch.float32)
    adapter = torch.tensor([1, -1, 0, 1, 0], device=device)
    scaling, ranks = torch.tensor([0.5, 2.0], device=device), [1, 2]
    for leaf in (x, a, b):
        leaf.requires_grad_()
    got = torch.autograd.grad(grouped_lora(x, a, b, ranks, adapter, scaling).sum(), (x, a, b))

    def gradients(wide: Callable[[Tensor], Tensor]) -> tuple[Tensor | None, ...]:
        ones = x.new_ones(M, N, dtype=torch.float64)
        rest = (wide(a), wide(b), ranks, adapter, wide(scaling))
        hidden = grouped.forward(wide(x), None, *rest)[1]
        return grouped.backward(ones, wide(x), *rest, hidden, (True,) * 3)

    for name, g, t, m in zip(("x", "lora_a", "lora_b"), got, gradients(_double), gradients(_magnitude), strict=True):
        right = t is not None and m is not None and _within(g, t, m, M + N + K + R)
        _require(right, f"d_{name} is outside the rounding bound")
    return "gradients within rounding"


def _double(t: Tensor) -> Tensor:
    return t.detach().double()


def _magnitude(t: Tensor) -> Tensor:
    return t.detach().double().abs()


def _within(got: Tensor, truth: Tensor, magnitude: Tensor, products: int) -> bool:
    """Say whether float32 sums of so many products are right up to rounding; Higham and Mary 2019."""
    bound = 2.0 * torch.finfo(torch.float32).eps * (products + 2) ** 0.5 * magnitude
    return bool(((got.double() - truth).abs() <= bound).all())


def _require_close(got: Tensor, args: tuple[Tensor, ...], weight: Tensor) -> None:
    x, _, bias, a, b = args
    truth, magnitude = (
        lora.lora_linear(wide(x), wide(weight), wide(bias), wide(a), wide(b), 0.5) for wide in (_double, _magnitude)
    )
    _require(_within(got, truth, magnitude, K + R), "outside the rounding bound")


def _require(agrees: bool, otherwise: str) -> None:
    if not agrees:
        raise Disagreement(otherwise)


# of each operation, by name: what says how its result on a device agrees with the reference, or raises
CHECKS: dict[str, Callable[[str], str]] = {
    "nf4_quantize": _check_quantize,
    "nf4_dequantize": _check_dequantize,
    "absmax_quantize": _check_absmax_quantize,
    "absmax_dequantize": _check_absmax_dequantize,
    "lora_linear": _check_linear,
    "lora_linear_backward": _check_backward,
    "nf4_lora_linear": _check_nf4_linear,
    "nf4_lora_linear_backward": _check_nf4_backward,
    "lora_linears": _check_linears,
    "lora_linears_backward": _check_linears_backward,
    "dora_norm": _check_dora_norm,
    "grouped_lora": _check_grouped,
    "grouped_lora_backward": _check_grouped_backward,
}
