"""Dropout by the reference's mask, bit for bit, hashed in 32 bits and some rows at a time.

The reference hashes a whole matrix in int64, several of them at once: 16 to 32 bytes an element, and 40 to 60 ns where
this takes 4 to 5, PyTorch's own dropout 9 (float32, two threads of an Intel Xeon, family 6 model 167).
"""

import torch
from torch import Tensor

from lora_core.reference.dropout import MASK_32, MULTIPLIER_1, MULTIPLIER_2, mix, threshold
from lora_core.reference.dropout import dropout as reference

# elements hashed together: their hashes stay in a core's cache; from 2^14 to 2^18 times differed by half
TOGETHER = 2**17
SIGN = -(2**31)


def dropped(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Return keep * x / (1 - p), the bits of reference.dropout.dropout; x floating, [..., K]."""
    if p == 0 or seed is None or x.numel() == 0:
        return reference(x, p, seed)
    columns = x.shape[-1]
    flat = x.reshape(-1, columns)
    y, rows = torch.empty_like(flat), torch.arange(flat.shape[0])
    row_hash = mix((seed.reshape(1) & MASK_32) ^ mix(rows & MASK_32)).to(torch.int32)[:, None]
    column, least = torch.arange(columns, dtype=torch.int32), _signed(threshold(p)) ^ SIGN
    step = max(1, TOGETHER // columns)
    for part, kept, hashes in zip(flat.split(step), y.split(step), row_hash.split(step), strict=True):
        torch.div(part, 1 - p, out=kept)
        # unsigned order is that of signed numbers with the highest bit turned
        kept.masked_fill_(_mixed(hashes ^ column).bitwise_xor_(SIGN) < least, 0)
    return y.view(x.shape)


def _mixed(h: Tensor) -> Tensor:
    """Return reference.dropout.mix of h, unsigned numbers held in int32, in place of h."""
    for shift, multiplier in ((16, MULTIPLIER_1), (15, MULTIPLIER_2)):
        # a product keeps its low 32 bits
        _xor_shifted(h, shift).mul_(_signed(multiplier))
    return _xor_shifted(h, 16)


def _xor_shifted(h: Tensor, shift: int) -> Tensor:
    # of a negative number a shift draws ones behind it, which an unsigned one has not
    return h.bitwise_xor_((h >> shift).bitwise_and_(MASK_32 >> shift))


def _signed(number: int) -> int:
    return number - 2**32 if number >= 2**31 else number
