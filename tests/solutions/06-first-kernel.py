"""A solution of docs/puzzles/06-first-kernel.py."""

import triton
import triton.language as tl


@triton.jit
def scale_kernel(x_ptr, y_ptr, n, factor, BLOCK: tl.constexpr):
    """Write factor * x, a tile a program."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = place < n
    tl.store(y_ptr + place, factor * tl.load(x_ptr + place, mask=ok, other=0.0), mask=ok)
