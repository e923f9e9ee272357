"""Backward without atomics.

    dB = factor * G^T S

sums over M tokens, and one program alone would take long. Programs that all add to one result by tl.atomic_add add in
whatever order they come, and floating-point addition depends on the order: two runs would differ. So:

partial_kernel: program (i, p) sums rows p ROWS to (p + 1) ROWS - 1 for the N-tile i, and writes part p;
sum_kernel: adds the parts, part 0 + part 1 + ..., always in this order, and multiplies by the factor at the end.

    g_ptr     float32 [M, N]             hidden_ptr  float32 [M, R]: S
    part_ptr  float32 [PARTS, N, R]      out_ptr     float32 [N, R], count = N R elements
    partial_kernel is started (ceil(N / BLOCK_N), ceil(M / ROWS)) times, sum_kernel ceil(count / BLOCK) times

The block sizes may all differ. BLOCK_R is at least R: one tile covers the rank. ROWS is a power of two: one tl.dot of
[BLOCK_N, ROWS] by [ROWS, BLOCK_R] does a whole part.
"""

import triton
import triton.language as tl


@triton.jit
def partial_kernel(
    g_ptr, hidden_ptr, part_ptr, M, N, R, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Write tile i of part p."""
    pass


@triton.jit
def sum_kernel(part_ptr, out_ptr, count, factor, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Write factor times the sum of the parts, BLOCK elements a program."""
    pass
