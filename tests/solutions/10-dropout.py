"""A solution of docs/puzzles/10-dropout.py."""

import triton
import triton.language as tl

from lora_core.kernels.tile import mix  # uint32 to uint32, elementwise


@triton.jit
def dropout_kernel(x_ptr, y_ptr, seed, M, N, threshold, factor, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Write a tile of y."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_hash = mix(seed.to(tl.uint32) ^ mix(row.to(tl.uint32)))
    keep = mix(row_hash[:, None] ^ column.to(tl.uint32)[None, :]) >= threshold.to(tl.uint32)
    place, ok = row[:, None] * N + column[None, :], (row < M)[:, None] & (column < N)[None, :]
    x = tl.load(x_ptr + place, mask=ok, other=0.0)
    tl.store(y_ptr + place, tl.where(keep, x * factor, 0.0), mask=ok)
