"""Triton kernel for lora_core::nf4_dequantize: codes and scales, plain or quantised, to a weight in one launch.

Second-level blocks of other than 256, the format's, take a launch of their own before it (nf4_tile.py).

    w[i] = level[code[i]] * absmax[i // BLOCK_SIZE]
    absmax[j] = level8[q[j]] * absmax2[j // 256] + offset        where the scales are quantised too

Every operation rounds once, so the bits are the reference's: no multiply-add may be fused.

A program expands UNITS units. Where n is a multiple of 32, a unit is a 32-bit word of eight codes, and a thread loads
four of them, 16 bytes, at once and stores 16 bytes at once; else it is a byte of two codes. No word straddles a block,
as blocks are multiples of 32.

Reads n / 2 bytes of codes and writes n elements: bound by memory if a weight takes few enough instructions. So a level
is fetched by one shuffle (nf4_levels.py), and a scale is made once for its block.

Reference: lora_core/reference/nf4.py
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.form import begins_aligned, form
from lora_core.kernels.log import log_launch
from lora_core.kernels.nf4_levels import SHUFFLED, levels_of_words
from lora_core.kernels.nf4_tile import NESTED_BLOCK, as_read
from lora_core.kernels.tables import levels
from lora_core.kernels.tile import round_to
from lora_core.kernels.variant import TYPES, Variant
from lora_core.ops.eager import register
from lora_core.ops.nf4_dequantize import op
from lora_core.ops.packed import Packed
from lora_core.quant.blockwise import BLOCK_SIZES
from lora_core.quant.double import NESTED_BLOCK_SIZE

# units of a warp, and warps of a program that no block makes larger. By the word 64 weights a thread and one warp,
# which waits for no other; of float32 128, and two warps, which have fewer scales each: what keeps instructions few
WORDS = {torch.float32: (512, 2), torch.float16: (256, 1), torch.bfloat16: (256, 1)}
BYTES = (512, 4)


def _nf4_dequantize_kernel(
    codes_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    levels_ptr,
    levels8_ptr,
    w_ptr,
    n: tl.int64,
    BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    PER_UNIT: tl.constexpr,
    UNITS: tl.constexpr,
    SHUFFLED: tl.constexpr,
):
    # int64: element numbers pass 2^31; inside a program 32 bits do
    start = tl.program_id(0).to(tl.int64) * (UNITS * PER_UNIT)
    left = tl.minimum(n - start, UNITS * PER_UNIT).to(tl.int32)
    unit = tl.arange(0, UNITS)
    # words come by fours: a bound known to be a multiple of four lets them be loaded at once
    unit_ok = unit < left // 32 * 4 if PER_UNIT == 8 else unit * PER_UNIT < left
    packed = tl.load(codes_ptr + start // PER_UNIT + unit, mask=unit_ok, other=0).to(tl.int32)

    # a program begins with a block, as it holds whole ones; each scale is made once and handed to its units
    blocks: tl.constexpr = UNITS * PER_UNIT // BLOCK_SIZE
    first_block = start // BLOCK_SIZE
    block = tl.arange(0, blocks)
    block_ok = block * BLOCK_SIZE < left
    absmax = tl.load(absmax_ptr + first_block + block, mask=block_ok, other=0)
    if NESTED:
        level8 = tl.load(levels8_ptr + absmax.to(tl.int32))
        # all of the program's scales share one of the second level
        tl.static_assert(NESTED_BLOCK % blocks == 0)
        absmax2 = tl.load(nested_absmax_ptr + first_block // NESTED_BLOCK)
        absmax = level8 * absmax2 + tl.load(nested_offset_ptr)
    # numbers of blocks spread rather than divided out: fewer instructions
    owner = tl.broadcast_to(block[:, None], (blocks, UNITS // blocks)).reshape(UNITS)
    scale = tl.gather(absmax, owner, 0)  # [UNITS]

    if PER_UNIT == 8:
        level = levels_of_words(packed, levels_ptr, UNITS, SHUFFLED)
    else:
        # the high half of a byte comes first
        code = tl.join(packed >> 4, packed & 15)
        table = tl.load(levels_ptr + tl.arange(0, 16))
        level = tl.gather(table, code.reshape(UNITS * 2), 0).reshape(UNITS, 2)

    element = tl.arange(0, PER_UNIT)
    place = unit[:, None] * PER_UNIT + element[None, :]
    # a bound known to be a multiple of 32 lets them be stored at once
    place_ok = place < left // 32 * 32 if PER_UNIT == 8 else place < left
    tl.store(w_ptr + start + place, round_to(level * scale[:, None], w_ptr.dtype.element_ty), mask=place_ok)


_FORMS = {"words": form(_nf4_dequantize_kernel, addresses=True), "bytes": form(_nf4_dequantize_kernel)}


def variants() -> Iterator[Variant]:
    """Every configuration the launch can choose."""
    kinds = (("words", "*i32", 8), ("bytes", "*u8", 2))
    choices = itertools.product((torch.float32, torch.float16, torch.bfloat16), BLOCK_SIZES, ("plain", "nested"), kinds)
    for dtype, block_size, scales, (kind, codes, per_unit) in choices:
        nested = scales == "nested"
        units, warps = _program(kind, block_size, dtype)
        yield Variant(
            name=f"{TYPES[dtype]} {block_size} {scales} {kind}",
            form=_FORMS[kind],
            types={
                "codes_ptr": codes,
                "absmax_ptr": "*u8" if nested else "*fp32",
                **dict.fromkeys(("nested_absmax_ptr", "nested_offset_ptr", "levels_ptr", "levels8_ptr"), "*fp32"),
                "w_ptr": f"*{TYPES[dtype]}",
                "n": "i64",
            },
            constants={
                "BLOCK_SIZE": block_size,
                "NESTED": nested,
                "PER_UNIT": per_unit,
                "UNITS": units,
                "SHUFFLED": True,
            },
            options=_options(warps),
            weights=per_unit * units,
        )


def _program(kind: str, block_size: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return units and warps of a program, which holds whole blocks."""
    per_unit, (of_a_warp, least) = (8, WORDS[dtype]) if kind == "words" else (2, BYTES)
    warps = max(least, block_size // (per_unit * of_a_warp))
    return warps * of_a_warp, warps


def _options(warps: int) -> dict[str, Any]:
    return {"num_warps": warps, "enable_fp_fusion": False}


def launch_nf4_dequantize(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    block_size: int,
    nested_block_size: int = NESTED_BLOCK_SIZE,
    shuffled: bool = SHUFFLED,
) -> Tensor:
    """Run the kernel; operands as checked by the op. Copies codes or scales that are not contiguous.

    Args:
        shuffled: whether levels are fetched by shuffles, which the interpreter cannot do, or from a table.
    """
    if dtype == torch.float64:
        # made from float32 products
        narrow = (codes, absmax, nested_absmax, nested_offset, shape, torch.float32, block_size, nested_block_size)
        return launch_nf4_dequantize(*narrow, shuffled).to(dtype)
    w = codes.new_empty(shape, dtype=dtype)
    n = w.numel()
    if n == 0:
        return w
    packed = Packed(codes, absmax, nested_absmax, nested_offset, shape, block_size, nested_block_size)
    codes, absmax, nested_absmax, nested_offset, *_ = as_read(packed)
    # a slice of a larger buffer may begin anywhere
    words = n % 32 == 0 and begins_aligned(codes, absmax, nested_absmax)
    kind, per_unit = ("words", 8) if words else ("bytes", 2)
    log_launch("nf4_dequantize", kind)
    units, warps = _program(kind, block_size, dtype)
    nested = nested_absmax is not None
    levels8 = levels("dynamic", codes.device)
    with torch.cuda.device_of(codes):
        _FORMS[kind][(triton.cdiv(n, per_unit * units),)](
            codes.view(-1).view(torch.int32) if words else codes,
            absmax,
            nested_absmax if nested_absmax is not None else levels8,
            nested_offset if nested_offset is not None else levels8,
            levels("nf4", codes.device),
            levels8,
            w,
            n,
            BLOCK_SIZE=block_size,
            NESTED=nested,
            PER_UNIT=per_unit,
            UNITS=units,
            SHUFFLED=shuffled,
            **_options(warps),
        )
    return w


register(op, "cuda", launch_nf4_dequantize)
