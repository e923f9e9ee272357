"""A solution of docs/puzzles/08-fused-epilogue.py."""

import triton
import triton.language as tl


@triton.jit
def lora_matmul_kernel(
    x_ptr,
    w_ptr,
    s_ptr,
    b_ptr,
    y_ptr,
    M,
    N,
    K,
    R,
    scaling,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Write a tile of y."""
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    column = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    base = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + row * K + k[None, :], mask=(row < M) & (k < K)[None, :], other=0.0)
        w = tl.load(w_ptr + column * K + k[:, None], mask=(column < N) & (k < K)[:, None], other=0.0)
        base = tl.dot(x, w, base, input_precision="ieee")
    low = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        s = tl.load(s_ptr + row * R + r[None, :], mask=(row < M) & (r < R)[None, :], other=0.0)
        b = tl.load(b_ptr + column * R + r[:, None], mask=(column < N) & (r < R)[:, None], other=0.0)
        low = tl.dot(s, b, low, input_precision="ieee")
    tl.store(y_ptr + row * N + column, base + scaling * low, mask=(row < M) & (column < N))
