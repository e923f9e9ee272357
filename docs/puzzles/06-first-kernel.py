"""A first kernel: tiles and bounds.

    y[i] = factor * x[i],  i < n

A Triton kernel is a program that runs once for each tile, all at the same time. Program p, tl.program_id(0), does the
BLOCK elements from p * BLOCK on; it computes with all of them at once, as with a small tensor. The last tile may reach
past n, and what lies there belongs to somebody else: loads and stores take a mask.

    x_ptr, y_ptr  pointers to float32 [n]; x_ptr + tl.arange(0, 4) points to four neighbours

The kernel is started ceil(n / BLOCK) times, with a BLOCK that differs from run to run. Without a GPU Triton's
interpreter runs it, one program after another: then print() works inside.
"""

import triton
import triton.language as tl


@triton.jit
def scale_kernel(x_ptr, y_ptr, n, factor, BLOCK: tl.constexpr):
    """Write factor * x, a tile a program."""
    pass
