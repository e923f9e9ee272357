"""Rounding bounds of RMS norm, SwiGLU and the rotary embedding, and of their gradients, from their formulas.

u is the unit roundoff of the result's dtype, e that of float32, in which all is computed; truths are float64, made of
the operands as they are. A sum of n products in float32 errs by 2 e sqrt(n) times the sum of magnitudes
(tolerance.py). A value that goes through c operations more errs by c e of itself.

The logistic function sigma errs by at most 6 e of itself: 3 e of exp(-x), where x is no more than rounded before and
the polynomial's rest is below e, one for 1 + exp(-x), one for the quotient, and one as products are rounded on the
way. Below 2^-126 it is a subnormal number, or none: there it is 2^-126 off at most.
"""

import torch
from tolerance import UNIT_FP32 as E
from tolerance import assert_within_bound
from torch import Tensor

LEAST = 2.0**-126


def unit(t: Tensor) -> float:
    return max(torch.finfo(t.dtype).eps / 2, 0.0)


def wide(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double().cpu() for t in tensors]


def check_rms_norm(y: Tensor, r: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    """r is the root of a sum of K squares, the mean, eps and the quotient: half their error, and two more."""
    x64, w64 = wide(x, weight)
    columns = x.shape[-1]
    flat = x64.reshape(-1, columns)
    root = torch.rsqrt(flat.square().mean(1) + eps)
    truth = (flat * root[:, None] * w64).view(x.shape)
    of_root = (columns**0.5 + 4) * E
    assert_within_bound(r.cpu(), root, of_root * root)
    assert y.dtype == x.dtype and y.is_contiguous()
    assert_within_bound(y.cpu(), truth, (unit(y) + of_root + 2 * E) * truth.abs())


def check_rms_norm_backward(
    d_x: Tensor, d_weight: Tensor | None, d_y: Tensor, x: Tensor, weight: Tensor, eps: float
) -> None:
    """n = x r and h = g w carry the error of r and of a product; <h, n> is a sum of K such products."""
    g, x64, w64 = wide(d_y, x, weight)
    columns = x.shape[-1]
    flat, g = x64.reshape(-1, columns), g.reshape(-1, columns)
    r = torch.rsqrt(flat.square().mean(1, keepdim=True) + eps)
    n, h = flat * r, g * w64
    inner, magnitude = (h * n).mean(1, keepdim=True), (h * n).abs().mean(1, keepdim=True)
    truth = r * (h - n * inner)
    of_root = (columns**0.5 + 4) * E
    parts = r * (h.abs() + n.abs() * magnitude)
    bound = unit(d_x) * truth.abs() + (3 * of_root + (2 * columns**0.5 + 8) * E) * parts
    assert d_x.dtype == x.dtype and d_x.is_contiguous() and d_x.shape == x.shape
    assert_within_bound(d_x.cpu().view(truth.shape), truth, bound)
    if d_weight is None:
        return
    terms = g * n
    of_sum = (2 * len(terms) ** 0.5 + 3) * E + of_root
    assert d_weight.dtype == weight.dtype
    total = terms.sum(0)
    assert_within_bound(d_weight.cpu(), total, unit(d_weight) * total.abs() + of_sum * terms.abs().sum(0))


def check_swiglu(y: Tensor, gate: Tensor, up: Tensor) -> None:
    g, u = wide(gate, up)
    truth = g * torch.sigmoid(g) * u
    assert y.dtype == gate.dtype and y.is_contiguous()
    assert_within_bound(y.cpu(), truth, (unit(y) + 8 * E) * truth.abs() + LEAST * (g * u).abs())


def check_swiglu_backward(d_gate: Tensor, d_up: Tensor, d_y: Tensor, gate: Tensor, up: Tensor) -> None:
    """1 - sigma errs by 6 e sigma and its own rounding; g times it, and 1 before that, may cancel."""
    d, g, u = wide(d_y, gate, up)
    sigma = torch.sigmoid(g)
    # torch.sigmoid(-g) is 1 - sigma, which a difference would round
    rest = torch.sigmoid(-g)
    of_gate, of_up = d * u * sigma * (1 + g * rest), d * g * sigma
    inner = (d * u).abs() * sigma * (12 * E * (1 + g.abs() * rest) + 7 * E * g.abs() * sigma)
    assert d_gate.dtype == d_up.dtype == gate.dtype and d_gate.is_contiguous() and d_up.is_contiguous()
    small = LEAST * (d * u).abs() * (1 + g.abs())
    assert_within_bound(d_gate.cpu(), of_gate, unit(d_gate) * of_gate.abs() + inner + small)
    assert_within_bound(d_up.cpu(), of_up, (unit(d_up) + 8 * E) * of_up.abs() + LEAST * (d * g).abs())


def check_rotary(y: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """A sum of two products."""
    assert y.is_contiguous()
    _check_turned(y, x, cos, sin, 1)


def check_rotary_backward(d_x: Tensor, d_y: Tensor, cos: Tensor, sin: Tensor) -> None:
    assert d_x.transpose(1, 2).is_contiguous()
    _check_turned(d_x, d_y, cos, sin.roll(sin.shape[-1] // 2, -1), -1)


def _check_turned(y: Tensor, x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> None:
    x64, c, s = wide(x, cos, sin)
    c, s = c[:, None], s[:, None]
    x1, x2 = x64.chunk(2, -1)
    turned = sign * torch.cat((-x2, x1), -1)
    truth = x64 * c + turned * s
    assert y.dtype == x.dtype
    assert_within_bound(y.cpu(), truth, unit(y) * truth.abs() + 2 * E * ((x64 * c).abs() + (turned * s).abs()))
