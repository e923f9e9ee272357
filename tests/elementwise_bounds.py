"""Rounding bounds of RMS norm, SwiGLU and the rotary embedding, and of their gradients, from their formulas.

u is the unit roundoff of the result's dtype, e that of float32, in which all is computed; truths are float64, made of
the operands as they are. A sum of n products in float32 errs by 2 e sqrt(n) times the sum of magnitudes
(tolerance.py). A value that goes through c operations more errs by c e of itself.

The logistic function sigma is 1 / (1 + exp(-x)). Of what exp(-x) is off, (1 - sigma) reaches the sum; the sum is
rounded, and a quotient is off by 4 e at most, as a GPU's is. exp(-x) itself is off by 3 e where x is no more than
rounded before and the polynomial's rest is below e; made as 2^y, y = -x log2(e), by (2 |x| + 4) e: y is rounded, as is
that constant, and a GPU's power is off by 4 e. What is no normal number of float32, or whose reciprocal is none, may
become 0.

Past the dtype's largest number an infinity is right as well, and below its smallest normal number a result may be off
by that: assert_within_bound allows for both.
"""

import torch
from tolerance import UNIT_FP32 as E
from tolerance import assert_within_bound
from torch import Tensor

LEAST = 2.0**-126


def unit(t: Tensor) -> float:
    return torch.finfo(t.dtype).eps / 2


def wide(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double().cpu() for t in tensors]


def check_rms_norm(y: Tensor, r: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    """A sum of K squares; a quotient off by 4 e, eps added, a root off by 4 e: of them r has half and the last 4.

    Squares are of one sign, so that errors are shares of the truth; y has two products more.
    """
    x64, w64 = wide(x, weight)
    columns = x.shape[-1]
    flat = x64.reshape(-1, columns)
    root = torch.rsqrt(flat.square().mean(1) + eps)
    truth = (flat * root[:, None] * w64).view(x.shape)
    of_root = (columns**0.5 + 3 + 4) * E
    assert r.dtype == torch.promote_types(x.dtype, torch.float32)
    assert_within_bound(r.cpu(), root, of_root * root)
    assert y.dtype == x.dtype and y.is_contiguous()
    assert_within_bound(y.cpu(), truth, (unit(y) + of_root + 2 * E) * truth.abs())


def check_rms_norm_backward(
    d_x: Tensor, d_weight: Tensor | None, d_y: Tensor, x: Tensor, weight: Tensor, r: Tensor
) -> None:
    """Of r as the backward gets it. dL/dx is a difference, which is rounded, and times r once more.

    In its first part h = g w is rounded; in its second n = x r, twice, h, their product, a sum of K, a quotient off by
    4 e, and the product with n. dL/dw is a sum over rows of products with n, which is rounded.
    """
    g, x64, w64, root = wide(d_y, x, weight, r)
    columns = x.shape[-1]
    flat, g = x64.reshape(-1, columns), g.reshape(-1, columns)
    root = root[:, None]
    n, h = flat * root, g * w64
    first, second = root * h, root * n * (h * n).mean(1, keepdim=True)
    truth = (first - second).view(x.shape)
    magnitude = root * n.abs() * (h * n).abs().mean(1, keepdim=True)
    bound = E * (3 * first.abs() + (11 + 2 * columns**0.5) * magnitude)
    assert d_x.dtype == x.dtype and d_x.is_contiguous()
    assert_within_bound(d_x.cpu(), truth, bound.view(x.shape) + unit(d_x) * truth.abs())
    if d_weight is None:
        return
    terms = g * n
    total = terms.sum(0)
    assert d_weight.dtype == weight.dtype
    of_sum = (2 + 2 * len(terms) ** 0.5) * E
    assert_within_bound(d_weight.cpu(), total, unit(d_weight) * total.abs() + of_sum * terms.abs().sum(0))


def of_sigmoid(g: Tensor, powers_of_two: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return sigma, 1 - sigma and what float32 may leave sigma off by."""
    # a difference would round 1 - sigma
    sigma, rest = torch.sigmoid(g), torch.sigmoid(-g)
    exponential = 2 * g.abs() + 4 if powers_of_two else 3
    return sigma, rest, sigma * E * (rest * exponential + 5) + LEAST


def check_swiglu(y: Tensor, gate: Tensor, up: Tensor, powers_of_two: bool = False) -> None:
    """Two products more than sigma; powers_of_two as the kernels make exp(-x) of them."""
    g, u = wide(gate, up)
    sigma, _, off = of_sigmoid(g, powers_of_two)
    truth = g * sigma * u
    assert y.dtype == gate.dtype and y.is_contiguous()
    assert_within_bound(y.cpu(), truth, (g * u).abs() * (off + 2 * E * sigma) + unit(y) * truth.abs())


def check_swiglu_backward(
    d_gate: Tensor, d_up: Tensor, d_y: Tensor, gate: Tensor, up: Tensor, powers_of_two: bool = False
) -> None:
    """The factor of dL/dgate is q = 1 + g (1 - sigma), whose difference, product and sum are rounded each."""
    d, g, u = wide(d_y, gate, up)
    sigma, rest, off = of_sigmoid(g, powers_of_two)
    q = 1 + g * rest
    off_q = g.abs() * (off + 2 * E * rest) + E * q.abs()
    of_gate, of_up = d * u * (sigma * q), d * (g * sigma)
    bound = (d * u).abs() * (q.abs() * off + sigma * off_q + 3 * E * sigma * q.abs())
    assert d_gate.dtype == d_up.dtype == gate.dtype and d_gate.is_contiguous() and d_up.is_contiguous()
    assert_within_bound(d_gate.cpu(), of_gate, bound + unit(d_gate) * of_gate.abs())
    bound = (d * g).abs() * (off + 2 * E * sigma)
    assert_within_bound(d_up.cpu(), of_up, bound + unit(d_up) * of_up.abs())


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
