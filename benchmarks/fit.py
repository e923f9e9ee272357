"""How a cost grows: the exponent of a power law through measured points."""

import math
from collections.abc import Sequence


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return p of cost = c size^p, by least squares on logarithms.

    Args:
        sizes: positive, at least two different ones.
        costs: positive, one for each size.
    Raises:
        ValueError: if there are fewer than two different sizes, or a number is not positive.
    """
    if len(set(sizes)) < 2 or len(sizes) != len(costs) or min(*sizes, *costs) <= 0:
        raise ValueError(f"want two or more different positive sizes and as many costs, got {sizes} and {costs}")
    xs, ys = [math.log(s) for s in sizes], [math.log(c) for c in costs]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return covariance / sum((x - mean_x) ** 2 for x in xs)
