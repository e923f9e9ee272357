"""Fused epilogue.

    y = x W^T + scaling S B^T        where S = x A^T was computed before

Two products, but y is written once: the low-rank part is added to the accumulator, still in registers, after the last
step over K. Program (i, j) does rows i BLOCK_M ... and columns j BLOCK_N ... of y, in steps of BLOCK_K over K and of
BLOCK_R over R; the four may all differ.

    x_ptr  float32 [M, K]        w_ptr  float32 [N, K]
    s_ptr  float32 [M, R]        b_ptr  float32 [N, R]        y_ptr  float32 [M, N]
    all row after row: element [m, k] of x is at x_ptr + m * K + k

tl.dot multiplies [BLOCK_M, BLOCK_K] by [BLOCK_K, BLOCK_N] and adds to an accumulator: tl.dot(a, b, acc,
input_precision="ieee") in full float32. W is [N, K]: load its tile so that it comes as [BLOCK_K, BLOCK_N].

What lies beyond an operand's end may be anything, NaN too: 0 * NaN is NaN.
"""

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
    pass
