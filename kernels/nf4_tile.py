"""A tile of an NF4 weight decoded inside a kernel, and what a launch passes for it.

Where K is a multiple of 16 a row is read as 32-bit words of eight codes, else element by element. A scale is made for
64 columns at once where each row consists of such, and else for each word, or each element: blocks may straddle rows.

Reference: lora_core/reference/nf4.py
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.absmax_dequantize import launch_absmax_dequantize
from lora_core.kernels.form import ALIGNMENT, begins_aligned
from lora_core.kernels.log import log_launch
from lora_core.kernels.nf4_levels import levels_of_words
from lora_core.kernels.tables import levels
from lora_core.ops.packed import Packed
from lora_core.quant.double import NESTED_BLOCK_SIZE

# columns that share a scale, at most; of a word
MOST_OF_A_SCALE, OF_A_WORD = 64, 8
# how any weight can be read
ELEMENTS = "elements"
# scales that share one of the second level, as kernels take it
NESTED_BLOCK = tl.constexpr(NESTED_BLOCK_SIZE)


@triton.jit
def _scales(
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    levels8_ptr,
    block,
    ok,
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
    levels_ptr,
    levels8_ptr,
    n,
    first_k,
    N,
    K,
    block_shift,
    NESTED: tl.constexpr,
    PER_SCALE: tl.constexpr,
    SHUFFLED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows n (int64) and BLOCK_K columns from first_k of W [N, K] in fp32, as the reference rounds them; 0 outside.

    PER_SCALE: columns that surely share a scale (per_scale); BLOCK_K and first_k are multiples of it. 1 reads
    element by element.
    """
    if PER_SCALE > 1:
        unit = first_k // 8 + tl.arange(0, BLOCK_K // 8)
        ok = (n < N)[:, None] & (unit < K // 8)[None, :]
        place = n[:, None] * (K // 8) + unit[None, :]  # [BLOCK_N, BLOCK_K / 8]
        packed = tl.load(codes_ptr + place, mask=ok, other=0)
        run = first_k // PER_SCALE + tl.arange(0, BLOCK_K // PER_SCALE)
        run_ok = (n < N)[:, None] & (run < K // PER_SCALE)[None, :]
        block = n[:, None] * K + run[None, :] * PER_SCALE >> block_shift  # [BLOCK_N, BLOCK_K / PER_SCALE]
        scale = _scales(absmax_ptr, nested_absmax_ptr, nested_offset_ptr, levels8_ptr, block, run_ok, NESTED)
        words: tl.constexpr = BLOCK_N * BLOCK_K // 8
        level = levels_of_words(packed.reshape(words), levels_ptr, words, SHUFFLED)
        level = level.reshape(BLOCK_N, BLOCK_K // PER_SCALE, PER_SCALE)
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
        w = level * _scales(absmax_ptr, nested_absmax_ptr, nested_offset_ptr, levels8_ptr, block, ok, NESTED)
    return w


def as_read(w: Packed) -> Packed:
    """Return a weight as kernels read it: contiguous, in second-level blocks of 256; other scales are made plain."""
    absmax, nested_absmax, offset = w.absmax, w.nested_absmax, w.nested_offset
    if nested_absmax is not None and offset is not None and w.nested_block_size != NESTED_BLOCK_SIZE:
        log_launch("nf4 weight", f"second-level blocks of {w.nested_block_size}, scales made plain")
        absmax = launch_absmax_dequantize(absmax, nested_absmax, offset, w.nested_block_size)
        nested_absmax = offset = None
    elif not all(t is None or t.is_contiguous() for t in w[:3]):
        log_launch("nf4 weight", "made contiguous", *w[:3])
    return w._replace(
        codes=w.codes.contiguous(),
        absmax=absmax.contiguous(),
        nested_absmax=None if nested_absmax is None else nested_absmax.contiguous(),
        nested_offset=offset,
        nested_block_size=NESTED_BLOCK_SIZE,
    )


def in_words(w: Packed) -> bool:
    """Say whether the rows of a weight can be read by the word, by fours at once; it is as as_read returns it."""
    return w.shape[1] % ALIGNMENT == 0 and begins_aligned(w.codes, w.absmax, w.nested_absmax)


def per_scale(block_k: int) -> dict[str, int]:
    """Return nf4_tile's PER_SCALE for tiles of block_k columns, by how W is read: columns that surely share a scale."""
    return {"blocks": min(MOST_OF_A_SCALE, block_k), "words": OF_A_WORD, ELEMENTS: 1}


def reading(w: Packed, block_k: int) -> str:
    """Return how a weight can be read in tiles of block_k columns: "blocks", "words" or "elements"."""
    if not in_words(w):
        return ELEMENTS
    most = per_scale(block_k)["blocks"]
    return "words" if w.block_size % most or w.shape[1] % most else "blocks"


def argument_types(kind: str, nested: bool) -> dict[str, str]:
    """Return the Triton types of what arguments gives, by the parameter's name; kind as reading says."""
    return {
        "codes_ptr": "*u8" if kind == ELEMENTS else "*i32",
        "absmax_ptr": "*u8" if nested else "*fp32",
        **dict.fromkeys(("nested_absmax_ptr", "nested_offset_ptr", "levels_ptr", "levels8_ptr"), "*fp32"),
    }


def arguments(w: Packed, kind: str) -> tuple[Tensor, ...]:
    """Return what a kernel's parameters from codes_ptr to levels8_ptr take; w as as_read returns it."""
    if w.nested_block_size != NESTED_BLOCK_SIZE:
        raise ValueError(f"second-level blocks of {w.nested_block_size}: want {NESTED_BLOCK_SIZE}, as as_read returns")
    device = w.codes.device
    levels8 = levels("dynamic", device)
    return (
        w.codes if kind == ELEMENTS else w.codes.view(-1).view(torch.int32),
        w.absmax,
        levels8 if w.nested_absmax is None else w.nested_absmax,
        levels8 if w.nested_offset is None else w.nested_offset,
        levels("nf4", device),
        levels8,
    )
