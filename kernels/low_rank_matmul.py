"""Triton kernel for a matrix product with the low-rank path in it: one write of y, nothing of its size beside it.

    y = x W^T + factor keep * (S B^T) + b        x [M, K], W [N, K], S [M, R], B [N, R]

The low-rank product and the bias start the accumulator, and x W^T is added on top: a second accumulator would cost as
many registers again. All sums run in float32 and are rounded once.

The backward's dL/dx = G W + keep * (dS A) / (1 - p) is the same product of G, W^T, dS and A^T; transposes are
strides. A step of lora_linear. Bound by compute for large M.

Reference: lora_core/reference/lora.py
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.crossover import log_launch
from lora_core.kernels.loads import in_wide_loads
from lora_core.kernels.tile import dot, low_rank_start, round_to, widen
from lora_core.kernels.variant import DTYPE_PAIRS, TYPES, Variant
from lora_core.reference.dropout import threshold

# rows of tiles whose columns are walked together, so that tiles at work share W in the cache
GROUP = 8


@dataclass(frozen=True)
class Tiling:
    """Sizes of a program's tiles, and how it runs.

    Args:
        m: rows.
        n: columns.
        k: terms of a step.
        warps: of a program.
        stages: steps whose loads are in flight.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int


# by dtype of x, the one with the fewest rows that hold M, else the last
HALF = (Tiling(16, 64, 128, 4, 3), Tiling(64, 64, 64, 4, 4), Tiling(128, 128, 64, 8, 4))
TILINGS = {
    torch.float32: (Tiling(16, 64, 32, 4, 3), Tiling(64, 64, 16, 4, 3)),
    torch.float16: HALF,
    torch.bfloat16: HALF,
}
# where elements are loaded one by one their addresses take the registers: fewer of them, and the fewest ranks of a step
LOOSE = (Tiling(16, 64, 64, 4, 3), Tiling(64, 64, 32, 4, 3))
LOOSE_TILINGS = {dtype: LOOSE if dtype != torch.float32 else tilings[:2] for dtype, tilings in TILINGS.items()}
# ranks of a step, by the dtype of S and B: a float32 product is unrolled into single multiply-adds
BLOCK_R = {torch.float32: (16,), torch.float16: (16, 32), torch.bfloat16: (16, 32)}


@triton.jit(do_not_specialize=["M", "R", "factor", "threshold"])
def _low_rank_matmul_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    s_ptr,
    b_ptr,
    seed_ptr,
    y_ptr,
    M,
    N,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_bias,
    stride_bn,
    stride_br,
    stride_ym,
    factor,
    threshold,
    HAS_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    group = program // (GROUP * tiles_n)
    rows_of_group = tl.minimum(tiles_m - group * GROUP, GROUP)
    inside = program % (GROUP * tiles_n)
    row = (group * GROUP + inside % rows_of_group).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (inside // rows_of_group).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok, column_ok = (row < M)[:, None], (column < N)[None, :]

    acc = low_rank_start(
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
        DROPOUT,
        BLOCK_M,
        BLOCK_N,
        BLOCK_R,
    )
    if HAS_BIAS:
        acc += widen(tl.load(bias_ptr + column * stride_bias, mask=column < N, other=0.0))[None, :]

    step = tl.arange(0, BLOCK_K)
    # int64: the stride of a view times BLOCK_K can pass 2^31
    ahead = tl.full((), BLOCK_K, tl.int64)
    x_tile = x_ptr + row[:, None] * stride_xm + step.to(tl.int64)[None, :] * stride_xk
    w_tile = w_ptr + column[None, :] * stride_wn + step.to(tl.int64)[:, None] * stride_wk
    for k in range(0, K, BLOCK_K):
        k_ok = k + step < K
        x = tl.load(x_tile, mask=row_ok & k_ok[None, :], other=0.0)
        w = tl.load(w_tile, mask=column_ok & k_ok[:, None], other=0.0)
        acc = dot(x, w, acc)
        x_tile += ahead * stride_xk
        w_tile += ahead * stride_wk
    y_tile = y_ptr + row[:, None] * stride_ym + column[None, :]
    if ACCUMULATE:
        acc += widen(tl.load(y_tile, mask=row_ok & column_ok, other=0.0))
    tl.store(y_tile, round_to(acc, y_ptr.dtype.element_ty), mask=row_ok & column_ok)


def variants() -> Iterator[Variant]:
    """Every configuration the launch can choose: forward with and without bias, backward with and without dropout.

    "added" is the low-rank product alone, added to what a library's product left in y. "narrow": B has fewer than 16
    ranks, or a number that is no multiple of 16. "odd": nor is any size. "strided": no dimension is contiguous.
    """
    for dtype, low in DTYPE_PAIRS:
        for tiling in TILINGS[dtype]:
            for block_r in BLOCK_R[low]:
                for use in ("plain", "bias", "transposed", "transposed dropout", "added", "added dropout"):
                    yield _variant(dtype, low, tiling, block_r, use)
            yield _variant(dtype, low, tiling, BLOCK_R[low][0], "bias", "narrow")
        for tiling in LOOSE_TILINGS[dtype]:
            for use in ("bias", "transposed dropout", "added dropout"):
                for kind in ("odd", "strided"):
                    yield _variant(dtype, low, tiling, BLOCK_R[low][0], use, kind)


def _variant(dtype: torch.dtype, low: torch.dtype, tiling: Tiling, block_r: int, use: str, kind: str = "") -> Variant:
    transposed = use.startswith("transposed") or use == "added dropout"
    # what is contiguous: the last dimension, and of a transpose the first
    unit = ("stride_wn", "stride_bn") if transposed else ("stride_wk", "stride_br")
    long: tuple[str, ...] = ("stride_wk", "stride_br") if transposed else ("stride_wn", "stride_bn")
    fixed: tuple[str, ...] = ("stride_xk", "stride_bias", *unit)
    aligned = ("N", "K", "stride_xm", "stride_ym", *(long[:1] if kind == "narrow" else long))
    if kind == "strided":
        fixed, long = (), ("stride_xk", "stride_bias", *unit, *long)
    return Variant(
        name=" ".join(
            (TYPES[dtype], TYPES[low], f"{tiling.m}x{tiling.n}x{tiling.k} rank {block_r} {use} {kind}")
        ).strip(),
        kernel=_low_rank_matmul_kernel,
        signature={
            **dict.fromkeys(("x_ptr", "w_ptr", "bias_ptr", "y_ptr"), f"*{TYPES[dtype]}"),
            **dict.fromkeys(("s_ptr", "b_ptr"), f"*{TYPES[low]}"),
            "seed_ptr": "*i64",
            **dict.fromkeys(("M", "N", "K", "R", "stride_xm", "stride_ym", *long), "i32"),
            "factor": "fp32",
            "threshold": "i64",
        },
        constants={
            **dict.fromkeys(fixed, 1),
            "HAS_BIAS": use == "bias",
            "ACCUMULATE": use.startswith("added"),
            "DROPOUT": use.endswith("dropout"),
            "BLOCK_M": tiling.m,
            "BLOCK_N": tiling.n,
            "BLOCK_K": tiling.k,
            "BLOCK_R": block_r,
            "GROUP": GROUP,
        },
        aligned=() if kind in ("odd", "strided") else aligned,
        options={"num_warps": tiling.warps, "num_stages": tiling.stages},
        tile_m=tiling.m if dtype != torch.float32 else 0,
    )


def launch_low_rank_matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    lora_b: Tensor,
    factor: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """Run the kernel; any strides. Copies an S that is not contiguous.

    Args:
        x: float32, float16 or bfloat16, shape [M, K].
        weight: dtype of x, shape [N, K].
        bias: dtype of x, shape [N], or None.
        hidden: S, dtype of lora_b, shape [M, R].
        lora_b: dtype of x or float32, shape [N, R].
        factor: multiplies the low-rank product.
        dropout: probability with which elements of the low-rank product are left out; the rest are not scaled up.
        seed: int64, one element; needed where dropout > 0.
        out: where to write y, its columns contiguous; by default a new tensor.
        accumulate: whether to add to what out holds.
    Returns:
        Shape [M, N], dtype of x.
    """
    (m, k), n, r = x.shape, weight.shape[0], lora_b.shape[1]
    y = x.new_empty(m, n) if out is None else out
    accumulate = accumulate and out is not None
    if y.numel() == 0:
        return y
    wide = in_wide_loads(x) and in_wide_loads(weight) and in_wide_loads(y)
    tilings = TILINGS[x.dtype] if wide else LOOSE_TILINGS[x.dtype]
    tiling = next((t for t in tilings if m <= t.m), tilings[-1])
    steps = BLOCK_R[lora_b.dtype] if wide else BLOCK_R[lora_b.dtype][:1]
    block_r = next((b for b in steps if r <= b), steps[-1])
    log_launch("low_rank_matmul", "loads of 16 bytes" if wide else "loads of single elements", hidden)
    with torch.cuda.device_of(x):
        _low_rank_matmul_kernel[(triton.cdiv(m, tiling.m) * triton.cdiv(n, tiling.n),)](
            x,
            weight,
            x if bias is None else bias,
            hidden.contiguous(),
            lora_b,
            seed if seed is not None and dropout else x,
            y,
            m,
            n,
            k,
            r,
            *x.stride(),
            *weight.stride(),
            1 if bias is None else bias.stride(0),
            *lora_b.stride(),
            y.stride(0),
            float(factor),
            threshold(dropout),
            HAS_BIAS=bias is not None,
            ACCUMULATE=accumulate,
            DROPOUT=dropout > 0,
            BLOCK_M=tiling.m,
            BLOCK_N=tiling.n,
            BLOCK_K=tiling.k,
            BLOCK_R=block_r,
            GROUP=GROUP,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
        )
    return y
