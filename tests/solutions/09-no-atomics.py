"""A solution of docs/puzzles/09-no-atomics.py."""

import triton
import triton.language as tl


@triton.jit
def partial_kernel(
    g_ptr, hidden_ptr, part_ptr, M, N, R, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Write tile i of part p."""
    part, column = tl.program_id(1), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, rank = part * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_R)
    row_ok, column_ok, rank_ok = row < M, column < N, rank < R
    g = tl.load(g_ptr + row[None, :] * N + column[:, None], mask=row_ok[None, :] & column_ok[:, None], other=0.0)
    s = tl.load(hidden_ptr + row[:, None] * R + rank[None, :], mask=row_ok[:, None] & rank_ok[None, :], other=0.0)
    place = part * N * R + column[:, None] * R + rank[None, :]
    tl.store(part_ptr + place, tl.dot(g, s, input_precision="ieee"), mask=column_ok[:, None] & rank_ok[None, :])


@triton.jit
def sum_kernel(part_ptr, out_ptr, count, factor, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Write factor times the sum of the parts, BLOCK elements a program."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = place < count
    acc = tl.zeros((BLOCK,), tl.float32)
    for part in range(PARTS):
        acc += tl.load(part_ptr + part * count + place, mask=ok, other=0.0)
    tl.store(out_ptr + place, factor * acc, mask=ok)
