"""Tile helpers that every kernel shares. Three faults of Triton's interpreter are met here and nowhere else."""

import os

import triton
import triton.language as tl

# read when imported, as Triton itself does
INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def widen(x):
    """x in fp32, exactly."""
    # the interpreter takes a subnormal of bfloat16 for zero
    if INTERPRETED and x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def meet(x, dtype: tl.constexpr):
    """x in the dtype of what it is multiplied by: its own, or fp32."""
    y = x
    if x.dtype != dtype:
        y = widen(x)
    return y


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in fp32, for a [M, K] and b [K, N] of one dtype, each side at least 16."""
    # the interpreter (Triton 3.6 to 3.9) computes a bfloat16 product wrongly, and says nothing
    if INTERPRETED:
        a = widen(a)
        b = widen(b)
    # "ieee": by default fp32 inputs may be rounded to tf32, 13 bits short of what the tolerance allows
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def mix(h):
    """Hash of uint32: lora_core.reference.dropout.mix."""
    h ^= h >> 16
    h *= 0x7FEB352D
    h ^= h >> 15
    h *= 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def keep(seed_ptr, row, column, threshold):
    """Which elements dropout keeps, [rows, columns]: the same for every tiling, as each depends on its place alone."""
    seed = tl.load(seed_ptr).to(tl.uint32)
    row_hash = mix(seed ^ mix(row.to(tl.uint32)))
    return mix(row_hash[:, None] ^ column.to(tl.uint32)[None, :]) >= threshold.to(tl.uint32)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """x (fp32) rounded once to dtype, ties to even."""
    # the interpreter cuts fp32 off to bfloat16, and takes subnormals for zero: make the bits by hand
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        # a NaN's bits might carry over into those of an infinity
        rounded = tl.where(x == x, rounded, 0x7FC00000)
        y = (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(dtype)
    return y


@triton.jit
def nearest_code(x, tree, LEVELS: tl.constexpr, DEPTH: tl.constexpr):
    """Codes, int32, of the levels nearest to x (fp32, one-dimensional), by tables.thresholds; NaN gets the last."""
    node = tl.full(x.shape, 1, tl.int32)
    for _ in tl.static_range(DEPTH):
        below = x < tl.gather(tree, node, 0)
        node = 2 * node + tl.where(below, 0, 1)
    return node - LEVELS


@triton.jit
def low_rank_start(
    s_ptr,
    b_ptr,
    seed_ptr,
    row,
    column,
    M,
    N,
    R,
    stride_bn,
    stride_br,
    factor,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """factor keep * (S B^T) for rows of S [M, R] and of B [N, R], fp32 [BLOCK_M, BLOCK_N]: where a product starts."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # few steps: loads in flight would cost registers
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        rank = r + tl.arange(0, BLOCK_R)
        s = tl.load(s_ptr + row[:, None] * R + rank[None, :], mask=(row < M)[:, None] & (rank < R)[None, :], other=0.0)
        b = tl.load(
            b_ptr + column[None, :] * stride_bn + rank.to(tl.int64)[:, None] * stride_br,
            mask=(column < N)[None, :] & (rank < R)[:, None],
            other=0.0,
        )
        acc = dot(s, b, acc)
    acc *= factor
    if threshold != 0:
        acc = tl.where(keep(seed_ptr, row, column, threshold), acc, 0.0)
    return acc
