"""Triton kernel for a matrix product with the low-rank path in it: one write of y, nothing of its size beside it.

    y = x W^T + factor keep * (S B^T) + b        x [M, K], W [N, K], S [M, R], B [N, R]

The low-rank product and the bias start the accumulator, and x W^T is added on top: a second accumulator would cost as
many registers again. All sums run in float32 and are rounded once.

The backward's dL/dx = G W + keep * (dS A) / (1 - p) is the same product of G, W^T, dS and A^T; transposes are
strides. A step of lora_linear. Bound by compute for large M.

Reference: lora_core/reference/lora.py
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.form import ALIGNMENT, Form, begins_aligned, form, in_wide_loads
from lora_core.kernels.log import log_launch
from lora_core.kernels.tables import seed_or_none
from lora_core.kernels.tile import dot, low_rank_start, round_to, widen
from lora_core.kernels.variant import DTYPE_PAIRS, TYPES, Variant, least_that_holds
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
        registers: of a thread at most; by default the compiler chooses, and may keep some in memory for more programs.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    registers: int | None = None


# by dtype of x, the one with the fewest rows that hold M, else the last
HALF = (Tiling(16, 64, 128, 4, 3), Tiling(64, 64, 64, 4, 4, 168), Tiling(128, 128, 64, 8, 4))
TILINGS = {
    torch.float32: (Tiling(16, 64, 32, 8, 3), Tiling(64, 64, 16, 4, 3)),
    torch.float16: HALF,
    torch.bfloat16: HALF,
}
# where elements are loaded one by one their addresses take the registers: fewer of them, and the fewest ranks of a
# step; nor could such loads feed the products of a large tile
LOOSE_HALF = (Tiling(16, 64, 32, 4, 3), Tiling(32, 64, 32, 4, 3))
LOOSE_TILINGS = {
    torch.float32: (Tiling(16, 64, 32, 8, 3), Tiling(64, 64, 16, 8, 3)),
    torch.float16: LOOSE_HALF,
    torch.bfloat16: LOOSE_HALF,
}
# ranks of a step, by the dtype of S and B: a float32 product is unrolled into single multiply-adds
BLOCK_R = {torch.float32: (16,), torch.float16: (16, 32), torch.bfloat16: (16, 32)}


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
    stride_bn,
    stride_br,
    stride_ym,
    has_bias,
    factor,
    threshold: tl.int64,
    ACCUMULATE: tl.constexpr,
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
        BLOCK_M,
        BLOCK_N,
        BLOCK_R,
    )
    acc += widen(tl.load(bias_ptr + column, mask=column < N * has_bias, other=0.0))[None, :]

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


# what is contiguous of W and B: the last dimension, and of transposes the first
_ROWS, _COLUMNS = ("stride_wk", "stride_br"), ("stride_wn", "stride_bn")
_SIZES = ("N", "K", "stride_xm", "stride_ym")
_FORMS = {
    # ranks may be any number
    "": form(_low_rank_matmul_kernel, ("stride_xk", *_ROWS), (*_SIZES, "stride_wn"), addresses=True),
    "transposed": form(_low_rank_matmul_kernel, ("stride_xk", *_COLUMNS), (*_SIZES, *_ROWS), addresses=True),
    "odd": form(_low_rank_matmul_kernel, ("stride_xk", *_ROWS)),
    "odd transposed": form(_low_rank_matmul_kernel, ("stride_xk", *_COLUMNS)),
    "strided": form(_low_rank_matmul_kernel),
}


def variants() -> Iterator[Variant]:
    """Every configuration the launch can choose: forward, and transposed the backward.

    "added" is added to what y holds. "odd": a size or a stride is no multiple of 16. "strided": no dimension is
    contiguous.
    """
    for (dtype, low), (kind, taken), added in itertools.product(DTYPE_PAIRS, _FORMS.items(), (False, True)):
        for tiling, block_r in itertools.product(_tilings(taken, dtype), _steps(taken, low)):
            yield _variant(dtype, low, tiling, block_r, kind, added)


def _variant(dtype: torch.dtype, low: torch.dtype, tiling: Tiling, block_r: int, kind: str, added: bool) -> Variant:
    sizes = f"{tiling.m}x{tiling.n}x{tiling.k} rank {block_r}"
    return Variant(
        name=" ".join(filter(None, (TYPES[dtype], TYPES[low], sizes, kind, "added" * added))),
        form=_FORMS[kind],
        types={
            **dict.fromkeys(("x_ptr", "w_ptr", "bias_ptr", "y_ptr"), f"*{TYPES[dtype]}"),
            **dict.fromkeys(("s_ptr", "b_ptr"), f"*{TYPES[low]}"),
            "seed_ptr": "*i64",
            "factor": "fp32",
            "threshold": "i64",
        },
        constants=_constants(tiling, block_r, added),
        options=_options(tiling),
        tile_m=tiling.m if dtype != torch.float32 else 0,
    )


def _constants(tiling: Tiling, block_r: int, accumulate: bool) -> dict[str, Any]:
    blocks = {"BLOCK_M": tiling.m, "BLOCK_N": tiling.n, "BLOCK_K": tiling.k, "BLOCK_R": block_r, "GROUP": GROUP}
    return {"ACCUMULATE": accumulate, **blocks}


def _options(tiling: Tiling) -> dict[str, Any]:
    most = {} if tiling.registers is None else {"maxnreg": tiling.registers}
    return {"num_warps": tiling.warps, "num_stages": tiling.stages, "enable_fp_fusion": True, **most}


def _tilings(taken: Form, dtype: torch.dtype) -> tuple[Tiling, ...]:
    return TILINGS[dtype] if taken.addresses else LOOSE_TILINGS[dtype]


def _steps(taken: Form, low: torch.dtype) -> tuple[int, ...]:
    """Ranks that a step may have: the fewest where elements are loaded one by one."""
    return BLOCK_R[low] if taken.addresses else BLOCK_R[low][:1]


def _unit(weight: Tensor, lora_b: Tensor) -> int | None:
    """Return which dimension of W is contiguous, or of B where W has no columns; None for neither."""
    decides = weight if weight.shape[1] else lora_b
    return next((unit for unit in (1, 0) if decides.stride(unit) == 1), None)


def _kind(x: Tensor, weight: Tensor, hidden: Tensor, lora_b: Tensor, y: Tensor, unit: int | None) -> str:
    """Return the form for these operands; a W without columns fits any."""
    if x.stride(1) != 1 or unit is None:
        return "strided"
    wide = in_wide_loads(x) and in_wide_loads(y) and (weight.shape[1] == 0 or in_wide_loads(weight, unit))
    wide = wide and begins_aligned(hidden, lora_b) and (unit == 1 or lora_b.stride(1) % ALIGNMENT == 0)
    return " ".join(filter(None, ("" if wide else "odd", "" if unit else "transposed")))


def _laid_out(t: Tensor) -> Tensor:
    """Return a copy with contiguous rows; contiguous() would leave the stride of a single column as it is."""
    return t.clone(memory_format=torch.contiguous_format)


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
    """Run the kernel; any strides. Copies a bias or an S that is not contiguous, and a B that is not so
    in the dimension in which W is.

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
    hidden, unit = hidden.contiguous(), _unit(weight, lora_b)
    if unit is not None and lora_b.stride(unit) != 1:
        lora_b = _laid_out(lora_b) if unit else _laid_out(lora_b.T).T
    kind = _kind(x, weight, hidden, lora_b, y, unit)
    taken = _FORMS[kind]
    tilings, steps = _tilings(taken, x.dtype), _steps(taken, lora_b.dtype)
    tiling = next((t for t in tilings if m <= t.m), tilings[-1])
    block_r = least_that_holds(r, steps)
    log_launch("low_rank_matmul", f"loads of {'16 bytes' if taken.addresses else 'single elements'}", hidden)
    with torch.cuda.device_of(x):
        taken[(triton.cdiv(m, tiling.m) * triton.cdiv(n, tiling.n),)](
            x,
            weight,
            x if bias is None else bias.contiguous(),
            hidden,
            lora_b,
            seed_or_none(seed, dropout, x.device),
            y,
            m,
            n,
            k,
            r,
            *x.stride(),
            # of a W without columns they do not matter: those that every form takes
            *(weight.stride() if k else ((0, 1) if unit else (1, 0))),
            *lora_b.stride(),
            y.stride(0),
            int(bias is not None),
            float(factor),
            threshold(dropout),
            **_constants(tiling, block_r, accumulate),
            **_options(tiling),
        )
    return y
