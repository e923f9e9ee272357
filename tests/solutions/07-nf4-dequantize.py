"""A solution of docs/puzzles/07-nf4-dequantize.py."""

import triton
import triton.language as tl


@triton.jit
def dequantize_kernel(packed_ptr, absmax_ptr, levels_ptr, w_ptr, n, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Write w, BLOCK weights a program."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = place < n
    byte = tl.load(packed_ptr + place // 2, mask=ok, other=0).to(tl.int32)
    code = tl.where(place % 2 == 0, byte >> 4, byte & 15)
    scale = tl.load(absmax_ptr + place // BLOCK_SIZE, mask=ok, other=0.0)
    tl.store(w_ptr + place, tl.load(levels_ptr + code) * scale, mask=ok)
