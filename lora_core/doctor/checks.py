"""Every operation on small inputs beside its reference: codes to the bit, products within a rounding bound."""

from collections.abc import Callable

import torch
from torch import Tensor

from lora_core.doctor.agreement import Disagreement, double, magnitude_of, on_cpu, require, require_close, within
from lora_core.doctor.block_checks import BLOCK_CHECKS
from lora_core.doctor.cases import CASES, SCALING, Case, Operands, operands
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
from lora_core.quant import QuantizedWeight, quantize_nf4
from lora_core.quant import double as scales
from lora_core.reference import dora, grouped, lora, nf4


def check(operation: str, device: str) -> str:
    """Return how this operation's results on this device agree with the reference.

    Raises:
        Disagreement: if they do not.
    """
    said = ""
    for case in CASES:
        try:
            said = CHECKS[operation](device, case)
        except Disagreement as wrong:
            raise Disagreement(f"{wrong}: {case}") from None
    return said


def _check_quantize(device: str, case: Case) -> str:
    for dtype in (torch.float32, torch.bfloat16):
        weight = operands(device, case._replace(dtype=dtype)).weight
        for got, want in zip(nf4_quantize(weight, 64), nf4.nf4_quantize(weight, 64), strict=True):
            require(torch.equal(got, want), f"codes or scales of a {dtype} weight differ")
    return "codes and scales equal"


def _check_dequantize(device: str, case: Case) -> str:
    weight = operands(device, case).weight
    for double_quant in (False, True):
        q = quantize_nf4(weight, 64, double_quant)
        packed = (*q.parts, q.shape)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            same = torch.equal(nf4_dequantize(*packed, dtype, 64), nf4.nf4_dequantize(*packed, dtype, 64))
            require(same, f"{dtype} weights differ, double quantisation {double_quant}")
    return "equal to the bit, three dtypes"


def _scales(device: str, case: Case) -> tuple[Tensor, Tensor]:
    absmax = operands(device, case).weight.float().abs().flatten()
    return absmax, scales.absmax_offset(absmax)


def _check_absmax_quantize(device: str, case: Case) -> str:
    absmax, offset = _scales(device, case)
    for got, want in zip(absmax_quantize(absmax, offset), scales.quantize_absmax(absmax, offset), strict=True):
        require(torch.equal(got, want), "codes or second-level scales differ")
    return "codes and scales equal"


def _check_absmax_dequantize(device: str, case: Case) -> str:
    absmax, offset = _scales(device, case)
    nested = (*scales.quantize_absmax(absmax, offset), offset)
    require(torch.equal(absmax_dequantize(*nested), scales.dequantize_absmax(*nested)), "scales differ")
    return "equal to the bit"


def _check_linear(device: str, case: Case) -> str:
    o = operands(device, case)
    require_close(lora_linear(*o[:5], SCALING, *o.mask), o, o.weight)
    return "within rounding"


def _check_nf4_linear(device: str, case: Case) -> str:
    o = operands(device, case)
    q: QuantizedWeight = quantize_nf4(o.weight)
    require_close(nf4_lora_linear(o.x, q, o.bias, o.a, o.b, SCALING, *o.mask), o, q.dequantize())
    return "within rounding"


def _check_backward(device: str, case: Case) -> str:
    o = operands(device, case)
    return _check_gradients(lambda x, a, b: lora_linear(x, o.weight, o.bias, a, b, SCALING, *o.mask), o, o.weight)


def _check_nf4_backward(device: str, case: Case) -> str:
    o = operands(device, case)
    q = quantize_nf4(o.weight)
    return _check_gradients(lambda x, a, b: nf4_lora_linear(x, q, o.bias, a, b, SCALING, *o.mask), o, q.dequantize())


def _check_linears(device: str, case: Case) -> str:
    o = operands(device, case)
    q = quantize_nf4(o.weight)
    ys = lora_linears(o.x, [Layer(w, o.bias, o.a, o.b, SCALING, *o.mask) for w in (o.weight, Packed.of(q))])
    for y, weight in zip(ys, (o.weight, q.dequantize()), strict=True):
        require_close(y, o, weight)
    return "a dense and an NF4 layer, within rounding"


def _check_linears_backward(device: str, case: Case) -> str:
    o = operands(device, case)
    q = quantize_nf4(o.weight)

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        layers = [Layer(w, o.bias, a, b, SCALING, *o.mask) for w in (o.weight, Packed.of(q))]
        return torch.stack(lora_linears(x, layers)).sum(0)

    # two layers with one pair: the gradients of both weights' sum, the pair's twice
    return _check_gradients(run, o, o.weight.double() + q.dequantize().double(), layers=2)


def _check_gradients(
    run: Callable[[Tensor, Tensor, Tensor], Tensor],
    o: Operands,
    weight: Tensor,
    layers: int = 1,
) -> str:
    """Compare d_x, d_lora_a and d_lora_b of the sum of y with the reference in float64.

    Args:
        run: returns y of x, A and B; of several layers their sum.
        o: x, A, B and the mask, and more.
        weight: W as it is multiplied, or the sum of several layers'.
        layers: how many layers have A and B.
    """
    leaves = [t.requires_grad_() for t in (o.x, o.a, o.b)]
    got = torch.autograd.grad(run(*leaves).sum(), leaves)
    truth, magnitude = (
        _gradients(SCALING * layers, on_cpu(o.mask), *map(wide, (o.x, weight, o.a, o.b)))
        for wide in (double, magnitude_of)
    )
    products = sum(o.x.shape) + sum(o.b.shape)
    for name, g, t, m in zip(("x", "lora_a", "lora_b"), got, truth, magnitude, strict=True):
        require(within(g, t, m, products), f"d_{name} is outside the rounding bound")
    return "gradients within rounding"


def _gradients(
    scaling: float, mask: tuple[float, Tensor], x: Tensor, weight: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, ...]:
    d_y, hidden = x.new_ones(len(x), len(weight)), lora.shrink(x, a, *mask)
    grads = lora.backward(d_y, x, weight, a, b, hidden, scaling, *mask, (True, False, False, True, True))
    return tuple(g for g in grads if g is not None)


def _check_dora_norm(device: str, case: Case) -> str:
    o = operands(device, case)
    return _norms_agree(dora_norm(o.weight, o.a, o.b, SCALING), o, o.weight)


def _check_nf4_dora_norm(device: str, case: Case) -> str:
    o = operands(device, case)
    q = quantize_nf4(o.weight)
    return _norms_agree(dora_norm(q, o.a, o.b, SCALING), o, q.dequantize(o.a.dtype))


def _norms_agree(got: Tensor, o: Operands, weight: Tensor) -> str:
    truth, bound = (
        dora.dora_norm_dense(wide(weight), wide(o.a), wide(o.b), SCALING) for wide in (double, magnitude_of)
    )
    # of squares, as the root of a small sum magnifies its error
    squares = got.double().square()
    require(within(squares, truth**2, bound**2, weight.shape[1] + 2 * len(o.a)), "norms differ")
    return "within rounding"


def _groups(device: str, case: Case) -> tuple[list[int], Tensor, Tensor]:
    """Return the ranks of two adapters, which of them each row has, -1 for none, and their scalings."""
    first = case.r // 3
    rows = torch.arange(case.m, device=device) % 3 - 1
    return [first, case.r - first], rows, torch.tensor([0.5, 2.0], device=device)


def _check_grouped(device: str, case: Case) -> str:
    x, _, _, a, b, _ = operands(device, case)
    ranks, adapter, scaling = _groups(device, case)
    got = grouped_lora(x, a, b, ranks, adapter, scaling)
    truth, magnitude = (
        grouped.forward(wide(x), None, wide(a), wide(b), ranks, adapter.cpu(), wide(scaling))[0]
        for wide in (double, magnitude_of)
    )
    require(within(got, truth, magnitude, case.k + case.r), "outside the rounding bound")
    return "within rounding"


def _check_grouped_backward(device: str, case: Case) -> str:
    x, _, _, a, b, _ = operands(device, case)
    ranks, adapter, scaling = _groups(device, case)
    for leaf in (x, a, b):
        leaf.requires_grad_()
    got = torch.autograd.grad(grouped_lora(x, a, b, ranks, adapter, scaling).sum(), (x, a, b))

    def gradients(wide: Callable[[Tensor], Tensor]) -> tuple[Tensor | None, ...]:
        ones = torch.ones(case.m, case.n, dtype=torch.float64)
        rest = (wide(a), wide(b), ranks, adapter.cpu(), wide(scaling))
        hidden = grouped.forward(wide(x), None, *rest)[1]
        return grouped.backward(ones, wide(x), *rest, hidden, (True,) * 3)

    for name, g, t, m in zip(("x", "lora_a", "lora_b"), got, gradients(double), gradients(magnitude_of), strict=True):
        right = t is not None and m is not None and within(g, t, m, sum(case[1:5]))
        require(right, f"d_{name} is outside the rounding bound")
    return "gradients within rounding"


# of each operation, by name: what says how its result on a device, of a case, agrees with the reference, or raises
CHECKS: dict[str, Callable[[str, Case], str]] = {
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
    "nf4_dora_norm": _check_nf4_dora_norm,
    "grouped_lora": _check_grouped,
    "grouped_lora_backward": _check_grouped_backward,
    **BLOCK_CHECKS,
}
