"""A picture to be compressed: a cross, a ring and two gradients, by formulas that need no file.

For pixel (i, j) of size x size, with u = (i + 1/2) / size downwards and v = (j + 1/2) / size to the right:

    background    0.1 + 0.4 v + 0.2 u
    ring          0.9   where |sqrt((u - 1/2)^2 + (v - 1/2)^2) - 0.33| < 0.04
    cross         1     where |u - 1/2| < 0.035 or |v - 1/2| < 0.035

A later line covers an earlier one. The background has rank 2, with the cross that covers it 3; the ring needs the rest.
"""

import torch
from torch import Tensor

from lora_core.errors import ConfigError

RING_RADIUS, RING_HALF_WIDTH, RING_GREY = 0.33, 0.04, 0.9
CROSS_HALF_WIDTH, CROSS_GREY = 0.035, 1.0
DARKEST, RIGHTWARDS, DOWNWARDS = 0.1, 0.4, 0.2


def picture(size: int = 64) -> Tensor:
    """Return the picture, greys from 0 to 1; computed in float64 and rounded once.

    Args:
        size: pixels a side, at least 1.
    Returns:
        float32 of shape [size, size].
    Raises:
        ConfigError: if size is below 1.
    """
    if size < 1:
        raise ConfigError(f"picture: size is {size}; want 1 pixel a side or more")
    place = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    u, v = place[:, None], place[None, :]
    grey = DARKEST + RIGHTWARDS * v + DOWNWARDS * u
    radius = ((u - 0.5) * (u - 0.5) + (v - 0.5) * (v - 0.5)).sqrt()
    grey = torch.where((radius - RING_RADIUS).abs() < RING_HALF_WIDTH, RING_GREY, grey)
    cross = ((u - 0.5).abs() < CROSS_HALF_WIDTH) | ((v - 0.5).abs() < CROSS_HALF_WIDTH)
    return torch.where(cross, CROSS_GREY, grey).float()
