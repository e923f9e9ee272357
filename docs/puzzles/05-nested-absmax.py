"""Nested absmax.

QLoRA's double quantisation keeps the scales themselves in 8 bits: their mean is subtracted, the rest is quantised in
blocks. Undo it:

    absmax[i] = levels[codes[i]] * absmax2[i // block_size] + offset

    codes       uint8 [n]
    absmax2     float32 [ceil(n / block_size)]
    offset      float32, one element: the mean
    levels      float32 [256]
    block_size  scales that share one of the second level

Compared to the bit: product and sum are rounded to float32 one after the other.

Source: Dettmers et al. 2023, section 3.
"""

import torch
from torch import Tensor


def decode_absmax(codes: Tensor, absmax2: Tensor, offset: Tensor, levels: Tensor, block_size: int) -> Tensor:
    """Return absmax, float32 of shape [n]."""
    raise NotImplementedError
