"""Dropout by the reference's mask, bit for bit, hashed in 32 bits: in compiled loops where Numba is installed.

The reference hashes a whole matrix in int64, several of them at once: 16 to 32 bytes an element, and 40 to 60 ns where
the loops take 0.1 to 0.2 and PyTorch's operations on some rows at a time 1.5 to 2 for a mask; PyTorch's own dropout
takes 9, applied (float32, two threads of an Intel Xeon, family 6 model 167).
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lora_core.cpu import compiled
from lora_core.cpu.chunks import CHUNK, SHARED, share
from lora_core.reference.dropout import MASK_32, MULTIPLIER_1, MULTIPLIER_2, Drop, mix, threshold
from lora_core.reference.dropout import dropout as reference

# elements hashed together: their hashes stay in a core's cache; from 2^14 to 2^18 times differed by half
TOGETHER = 2**17
SIGN = -(2**31)


def dropped(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Return keep * x / (1 - p), the bits of reference.dropout.dropout; x floating, [..., K]."""
    return _masked(x, p, seed, _gone)


def one_mask_each() -> Drop:
    """Return dropout that makes the mask of a seed once, for all that a backward drops by it."""
    made: dict[tuple[int, float], Tensor] = {}

    def gone(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
        key = id(seed), p
        if key not in made:
            made[key] = _gone(seed, rows, columns, p)
        return made[key]

    return lambda x, p, seed: _masked(x, p, seed, gone)


def _masked(x: Tensor, p: float, seed: Tensor | None, gone: Callable[..., Tensor]) -> Tensor:
    if p == 0 or seed is None or x.numel() == 0:
        return reference(x, p, seed)
    columns = x.shape[-1]
    return torch.div(x, 1 - p).masked_fill_(gone(seed, x.numel() // columns, columns, p).view(x.shape), 0)


def _gone(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """Return what reference.dropout.keep_mask does not keep."""
    row_hash = mix((seed.to("cpu").reshape(1) & MASK_32) ^ mix(torch.arange(rows, device="cpu") & MASK_32))
    mask = torch.empty(rows, columns, dtype=torch.bool, device="cpu")
    loops = compiled.load_for("dropout", rows * columns)
    if loops is None:
        _fill(mask, row_hash.to(torch.int32), threshold(p))
    else:
        hashes, least = row_hash.numpy().astype(np.uint32), np.uint32(threshold(p))
        chunk, of_a_thread = (max(elements // columns, 1) for elements in (SHARED, CHUNK))
        share(loops.mask, rows, chunk, of_a_thread, hashes, least, mask.numpy())
    return mask


def _fill(mask: Tensor, row_hash: Tensor, least: int) -> None:
    """Do by PyTorch's operations what compiled.dropout.mask does."""
    columns = mask.shape[1]
    column, step = torch.arange(columns, dtype=torch.int32, device="cpu"), max(1, TOGETHER // columns)
    # unsigned order is that of signed numbers with the highest bit turned
    bound = _signed(least) ^ SIGN
    for hashes, part in zip(row_hash[:, None].split(step), mask.split(step), strict=True):
        torch.lt(_mixed(hashes ^ column).bitwise_xor_(SIGN), bound, out=part)


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
