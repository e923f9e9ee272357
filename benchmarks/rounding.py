"""Whether a result of matrix products is right up to rounding, for a benchmark's check."""

from typing import Any

from benchmarks.case import Check

UNIT_FP32 = 2.0**-24


def within_rounding(got: Any, truth: Any, magnitude: Any, products: int, roundings: int) -> Check:
    """Compare a tensor with the truth in float64.

    Args:
        got: the result, any floating dtype.
        truth: float64, the same shape.
        magnitude: float64, the same shape: the formula on absolute values.
        products: summed in float32 for one element.
        roundings: results inside the formula that are rounded to got's dtype, the last one included.
    Returns:
        Passed if no element is further off than sums in float32 and these roundings allow, by the probabilistic bound
        of Higham and Mary 2019.
    """
    import torch

    unit = torch.finfo(got.dtype).eps / 2
    error = (got.detach().double() - truth).abs()
    bound = (2 * UNIT_FP32 * products**0.5 + roundings * unit) * magnitude + torch.finfo(got.dtype).smallest_normal
    worst = float((error / bound).max())
    rms = float(error.square().mean().sqrt())
    return Check(worst <= 1, float(error.max()), rms, f"an element is {worst:.3g} times the rounding bound off")
