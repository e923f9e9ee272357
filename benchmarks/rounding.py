"""Whether a result of matrix products is right up to rounding, for a benchmark's check."""

from collections.abc import Sequence
from typing import Any

from benchmarks.case import Check

UNIT_FP32 = 2.0**-24
# of a part of the formula, such as the update: what more, or less, of it is not rounding
LEAST_SHARE = 0.005
# standard deviations that rounding leaves a share inside; of a normal distribution all but 2 in 10^9
DEVIATIONS = 6


def within_rounding(
    got: Any, truth: Any, magnitude: Any, products: int, roundings: int, parts: Sequence[Any] = ()
) -> Check:
    """Compare a tensor with the truth in float64.

    In half precision what rounding allows one element may be more than an update is, or a bias. So, where the parts are
    given that the truth is made of, the error's rms is bounded by the rms of what is rounded, and no part may stand in
    the error as if there were more or less of it: rounding is independent of it.

    Args:
        got: the result, any floating dtype.
        truth: float64, the same shape.
        magnitude: float64, the same shape: the formula on absolute values.
        products: summed in float32 for one element.
        roundings: results inside the formula that are rounded to got's dtype, the last one included.
        parts: float64, the same shape: what each operand contributes to the truth.
    Returns:
        Passed if no element is further off than sums in float32 and these roundings allow, nor all of them together: of
        independent errors of the sums 3.5 standard deviations.
    """
    import torch

    unit = torch.finfo(got.dtype).eps / 2
    error = got.detach().double() - truth
    tiny, of_sums = torch.finfo(got.dtype).smallest_normal, 2 * UNIT_FP32 * products**0.5
    worst = float((error.abs() / ((of_sums + roundings * unit) * magnitude + tiny)).max())
    reasons = [f"an element is {worst:.3g} times the rounding bound off"] if not worst <= 1 else []
    rms = _rms(error)
    if parts:
        rounded = (roundings * (_rms(truth) ** 2 + sum(_rms(part) ** 2 for part in parts))) ** 0.5
        bound = unit * rounded + of_sums * _rms(magnitude) + tiny
        if not rms <= bound:
            reasons.append(f"the error's rms is {rms / bound:.3g} times what rounding allows")
    for part in parts:
        size = _rms(part)
        if size > 0:
            share = float((error * part).mean()) / size**2
            allowed = max(LEAST_SHARE, DEVIATIONS * rms / size / error.numel() ** 0.5)
            if not abs(share) <= allowed:
                reasons.append(f"{share:+.2%} of a part of the formula is in the error; want at most {allowed:.2%}")
    return Check(not reasons, float(error.abs().max()), rms, "; ".join(reasons))


def _rms(t: Any) -> float:
    return float(t.square().mean().sqrt())
