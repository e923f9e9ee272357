"""Dropout whose mask is a function of (seed, row, column), not of the order in which elements are visited.

    keep[m, k] = hash(hash(seed xor hash(m)) xor k) >= p 2^32

Any tiling of x computes the same mask, and the backward computes it again instead of storing it. The hash is 32-bit
integer arithmetic: xor, shift, multiply modulo 2^32.

Source of the mixer and its constants: Wellons 2018, "lowbias32", public domain, found by search for low avalanche bias.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lora_core.errors import ConfigError

# what computes dropout, as the function of that name does; a faster one has to give the same bits
Drop = Callable[[Tensor, float, Tensor | None], Tensor]

MASK_32 = 0xFFFFFFFF
MULTIPLIER_1 = 0x7FEB352D
MULTIPLIER_2 = 0x846CA68B


def mix(h: Tensor) -> Tensor:
    """Return the 32-bit hash of integers in [0, 2^32), held in int64: a bijection that flips half the bits."""
    h = h ^ (h >> 16)
    h = (h * MULTIPLIER_1) & MASK_32
    h = h ^ (h >> 15)
    # the product can pass 2^63: int64 wraps, and its low 32 bits stay right
    h = (h * MULTIPLIER_2) & MASK_32
    return h ^ (h >> 16)


def keep_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """Return which elements dropout keeps: True with probability 1 - p.

    Args:
        seed: int64, one element.
        rows: M.
        columns: K.
        p: probability of dropping, in [0, 1).
    Returns:
        bool of shape [M, K], on the seed's device.
    """
    row = torch.arange(rows, device=seed.device)
    column = torch.arange(columns, device=seed.device)
    row_hash = mix((seed.reshape(1) & MASK_32) ^ mix(row & MASK_32))
    return mix(row_hash[:, None] ^ column[None, :]) >= threshold(p)


def threshold(p: float) -> int:
    """Return the hash value from which on an element is kept."""
    # a hash is below 2^32: the largest p drops all but one in 2^32
    return min(round(p * 2**32), MASK_32)


def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Return keep * x / (1 - p), the same shape as x; its rows are x's leading dimensions, flattened.

    Args:
        x: floating, shape [..., K].
        p: probability of dropping; 0 returns x itself.
        seed: int64, one element; unused at p = 0.
    """
    if p == 0:
        return x
    if seed is None:
        raise ConfigError(f"dropout of probability {p} needs a seed: pass an int64 tensor of one element")
    columns = x.shape[-1]
    keep = keep_mask(seed.to(x.device), math.prod(x.shape[:-1]), columns, p)
    return torch.where(keep.view(x.shape), x / (1 - p), 0)
