"""A tile of an NF4 weight decoded inside a kernel, and what a launch passes for it.

Where K is a multiple of 8 a row is read as 32-bit words of eight codes, else element by element. A scale is made for
each word, or each element: blocks may straddle rows.

Reference: lora_core/reference/nf4.py
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.tables import level_pairs, levels
from lora_core.ops.packed import Packed


@triton.jit
def _scales(
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    levels8_ptr,
    block,
    ok,
    NESTED_BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
):
    """Scales of blocks, fp32, as the reference rounds them; 0 where not ok."""
    absmax = tl.load(absmax_ptr + block, mask=ok, other=0)
    if NESTED:
        level8 = tl.load(levels8_ptr + absmax.to(tl.int32))
        absmax2 = tl.load(nested_absmax_ptr + block // NESTED_BLOCK, mask=ok, other=0.0)
        absmax = tl.where(ok, level8 * absmax2 + tl.load(nested_offset_ptr), 0.0)
    return absmax


@triton.jit
def nf4_tile(
    codes_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    pairs_ptr,
    levels_ptr,
    levels8_ptr,
    n,
    first_k,
    N,
    K,
    block_shift,
    NESTED_BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows n (int64) and BLOCK_K columns from first_k of W [N, K] in fp32, as the reference rounds them; 0 outside."""
    if WORDS:
        unit = first_k // 8 + tl.arange(0, BLOCK_K // 8)
        ok = (n < N)[:, None] & (unit < K // 8)[None, :]
        place = n[:, None] * (K // 8) + unit[None, :]  # [BLOCK_N, BLOCK_K / 8]
        packed = tl.load(codes_ptr + place, mask=ok, other=0)
        block = place * 8 >> block_shift
        scale = _scales(absmax_ptr, nested_absmax_ptr, nested_offset_ptr, levels8_ptr, block, ok, NESTED_BLOCK, NESTED)
        # the lowest byte of a word comes first
        byte = (packed[:, :, None] >> (tl.arange(0, 4) * 8)[None, None, :]) & 0xFF
        pairs = tl.load(pairs_ptr + tl.arange(0, 256))
        pair = tl.gather(pairs, byte.reshape(BLOCK_N * BLOCK_K // 2), 0)
        even = pair.to(tl.int32).to(tl.float32, bitcast=True)
        odd = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        level = tl.join(even, odd).reshape(BLOCK_N, BLOCK_K // 8, 8)
        w = (level * scale[:, :, None]).reshape(BLOCK_N, BLOCK_K)
    else:
        k = first_k + tl.arange(0, BLOCK_K)
        ok = (n < N)[:, None] & (k < K)[None, :]
        place = n[:, None] * K + k[None, :]
        byte = tl.load(codes_ptr + place // 2, mask=ok, other=0).to(tl.int32)
        # the high half comes first
        code = tl.where(place % 2 == 0, byte >> 4, byte & 15)
        table = tl.load(levels_ptr + tl.arange(0, 16))
        level = tl.gather(table, code.reshape(BLOCK_N * BLOCK_K), 0).reshape(BLOCK_N, BLOCK_K)
        block = place >> block_shift
        w = level * _scales(
            absmax_ptr, nested_absmax_ptr, nested_offset_ptr, levels8_ptr, block, ok, NESTED_BLOCK, NESTED
        )
    return w


def in_words(w: Packed) -> bool:
    """Say whether the rows of a weight can be read by the word: its codes are contiguous and begin with one."""
    return w.shape[1] % 8 == 0 and w.codes.data_ptr() % 4 == 0


def arguments(w: Packed) -> tuple[Tensor, ...]:
    """Return what a kernel's parameters from codes_ptr to levels8_ptr take; w.codes must be contiguous."""
    device = w.codes.device
    levels8 = levels("dynamic", device)
    return (
        w.codes.view(-1).view(torch.int32) if in_words(w) else w.codes,
        w.absmax.contiguous(),
        levels8 if w.nested_absmax is None else w.nested_absmax.contiguous(),
        levels8 if w.nested_offset is None else w.nested_offset,
        level_pairs("nf4", device),
        levels("nf4", device),
        levels8,
    )
