"""Rounding bounds of causal attention and its gradients, from their formulas, whatever the order of their sums.

e is the unit roundoff of float32, in which all is computed, u that of a result's dtype, to which it is rounded once;
truths are float64, made of the operands as they are. A sum of n products in float32 errs by 2 e sqrt(n) times the sum
of magnitudes (tolerance.py), with fused multiply-adds by less. |X| and what is written
as a product by a space, of two matrices of one shape, is meant element by element.

The softmax P of scores S, less the largest of their row. A score is a sum of D products, and times the scale, which
is rounded as well: before or after, of the scores or of one of the operands. The largest is subtracted from it before
the scale or after that, by a fused operation or not: of the difference three roundings are left. An error that all of
a row have alike, as that of its largest, leaves P as it is. An exponential is off by x e of itself, 4 e at most. So
exp(S) is off by a factor between exp(-h) and exp(h),

    h = e ((2 sqrt(D) + 2) |s| |Q| |K|^T + 3 (max S - S) + x),

and P, which is one of them by their sum, is between

    P exp(-h) / sum(P exp(h)) and P exp(h) / sum(P exp(-h)), and at most 1.

The sum of exponentials is one of up to T, of one sign; a quotient is off by 4 e, and the product with the reciprocal,
here or in what P is multiplied with, rounded. What is no normal number of float32 may become 0, or a smallest one. So
P is off by B at most, the larger distance to these ends, with (2 sqrt(T) + 5) e of the upper one, and twice 2^-126.

Products of P. Where P enters a sum, its roundings are shares of |P| + B, and likewise of what follows:

    O   off by B |V|                + 2 e sqrt(T) (|P| + B) |V|,
    dV  off by B^T |dO|             + 2 e sqrt(T H / G) (|P| + B)^T |dO|.

dP is off by b = 2 e sqrt(E) |dO| |V|^T. The mean of dP by row is a sum of T products with P or, as it is <dO, O>, one
of E products with O: of |dO| times what O is off by, or of P as much as that, and never more than

    c = sum by row of B |dO| |V|^T + 2 e (sqrt(T) + sqrt(E)) (|P| + B) |dO| |V|^T.

dS = P (dP - mean), with four roundings, those of the difference, of both products and of the scale, is off by

    f = B |dP - mean| + (|P| + B) (b + c + 4 e (|dP - mean| + b + c)),

and times the scale, in the end or before, in sums of T, and of T H / G, products,

    dQ  off by |s| f |K|            + 2 e sqrt(T) |s| (|dS| + f) |K|,
    dK  off by |s| f^T |Q|          + 2 e sqrt(T H / G) |s| (|dS| + f)^T |Q|.

Each result is rounded, by u of itself. Nothing above takes errors to be independent but the sums, and nothing leaves
out a product of errors but those of e: where scores are so large that their roundings are, P is off by up to 1. Sums
whose magnitude is below the normal numbers err as the smallest does. Past the dtype's largest number an infinity is
right as well: assert_within_bound allows for that.

Source: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., sections 3.1 and 3.3.
"""

from collections.abc import Sequence

import torch
from tolerance import UNIT_FP32 as E
from tolerance import assert_within_bound
from torch import Tensor

LEAST = 2.0**-126
# units that an exponential may be off by
EXPONENTIAL = 4
RESULTS = ("o", "d_q", "d_k", "d_v")


def bounds(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, exponential: float = EXPONENTIAL
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the truth and what a result may be off, float64, by name: "o", "d_q", "d_k" and "d_v".

    Args:
        d_o, q, k, v: [B, H, T, E], [B, H, T, D], [B, G, T, D] and [B, G, T, E], of one dtype, that of the results.
        scale: s.
        exponential: x, in units of e.
    """
    g, queries = (_grouped(t, k) for t in (d_o, q))
    keys, values = (t.detach().double().cpu()[:, :, None] for t in (k, v))
    shared, tokens, width = queries.shape[2:]
    size = values.shape[-1]
    u = torch.finfo(q.dtype).eps / 2
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()

    # what a product loses that is below the normal numbers, the scale multiplies
    factor = max(abs(scale), 1.0)
    scores = scale * queries @ keys.mT
    magnitude = abs(scale) * queries.abs() @ keys.abs().mT
    scores = scores.masked_fill(~seen, -torch.inf)
    off = E * (
        (2 * width**0.5 + 2) * (magnitude + factor * LEAST) + 3 * (scores.amax(-1, keepdim=True) - scores) + exponential
    )
    off = off.masked_fill(~seen, 0)
    # in logarithms, as exp(h) may be past a float64
    log_p = scores.log_softmax(-1)
    p = log_p.exp()
    upper = (log_p + off - (log_p - off).logsumexp(-1, keepdim=True)).clamp(max=0).exp()
    lower = (log_p - off - (log_p + off).logsumexp(-1, keepdim=True)).exp()
    b_p = torch.maximum(upper - p, p - lower) + (2 * tokens**0.5 + 5) * E * upper + 2 * LEAST * seen
    most_p = p + b_p

    o = p @ values
    b_o = b_p @ values.abs() + _sum(tokens, most_p @ values.abs())
    d_v = p.mT @ g
    # over the heads that share them
    rows = tokens * shared
    b_v = (b_p.mT @ g.abs()).sum(2) + _sum(rows, (most_p.mT @ g.abs()).sum(2))

    d_p, d_p_magnitude = g @ values.mT, g.abs() @ values.abs().mT
    b_d_p = _sum(size, d_p_magnitude)
    less_mean = d_p - (p * d_p).sum(-1, keepdim=True)
    of_mean = b_p * d_p_magnitude + 2 * E * (tokens**0.5 + size**0.5) * (most_p * d_p_magnitude + LEAST)
    of_difference = b_d_p + of_mean.sum(-1, keepdim=True)
    d_s = p * less_mean
    b_s = b_p * less_mean.abs() + most_p * (of_difference + 4 * E * (less_mean.abs() + of_difference))
    b_s = abs(scale) * b_s + 4 * E * factor * LEAST * seen
    most_s = abs(scale) * d_s.abs() + b_s
    d_q, d_k = scale * d_s @ keys, scale * d_s.mT @ queries
    b_q = b_s @ keys.abs() + _sum(tokens, most_s @ keys.abs())
    b_k = (b_s.mT @ queries.abs()).sum(2) + _sum(rows, (most_s.mT @ queries.abs()).sum(2))

    truths = (o.flatten(1, 2), d_q.flatten(1, 2), d_k.sum(2), d_v.sum(2))
    off_by = (b_o.flatten(1, 2), b_q.flatten(1, 2), b_k, b_v)
    found = zip(RESULTS, truths, off_by, strict=True)
    return {name: (truth, bound + u * (truth.abs() + bound)) for name, truth, bound in found}


def check_forward(o: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """Fail unless o is attention's up to rounding, of q's dtype and token by token in memory."""
    nothing = q.new_zeros(*q.shape[:3], v.shape[-1])
    _check({"o": o}, bounds(nothing, q, k, v, scale), q.dtype)


def check_backward(grads: Sequence[Tensor], d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """Fail unless grads (d_q, d_k, d_v) are attention's up to rounding, of q's dtype and token by token in memory."""
    _check(dict(zip(RESULTS[1:], grads, strict=True)), bounds(d_o, q, k, v, scale), q.dtype)


def _check(made: dict[str, Tensor], found: dict[str, tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
    for name, got in made.items():
        assert got.dtype == dtype and got.transpose(1, 2).is_contiguous(), f"{name} is {got.dtype}, {got.stride()}"
        assert_within_bound(got.cpu(), *found[name])


def _grouped(t: Tensor, k: Tensor) -> Tensor:
    """Return [B, G, H / G, T, N] of [B, H, T, N], in float64."""
    b, h, tokens, size = t.shape
    return t.detach().double().cpu().reshape(b, k.shape[1], h // k.shape[1], tokens, size)


def _sum(terms: int, magnitude: Tensor) -> Tensor:
    """Return what a float32 sum of so many products is off."""
    return 2 * E * terms**0.5 * (magnitude + LEAST)
