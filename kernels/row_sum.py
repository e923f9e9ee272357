"""Triton kernel for products that sum over tokens: the gradients of A, B and the bias, and of S from the same read.

    P = factor drop(D)^T T        D [M, C], T [M, R], P [C, R]
    d_bias = column sums of D                              where asked for
    d_s = factor D B                                       where asked for, B [C, R]

With D = dL/dy, T = S and B it makes dL/dB, dL/db and dL/dS from one read of dL/dy; with D = x and T = dL/dS it makes
(dL/dA)^T, dropout inside. A step of lora_linear's backward.

A program owns BLOCK_C columns and a range of rows. Its parts, P over ranges of rows and d_s over blocks of columns,
are added in a fixed order by split_sum.py: no atomics, the same bits every time. Bound by memory: reads D
once, and writes and reads parts of 4 M R C / BLOCK_C bytes.

Reference: lora_core/reference/lora.py
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.form import ALIGNMENT, begins_aligned, form, in_wide_loads
from lora_core.kernels.processors import splits_to_fill
from lora_core.kernels.split_sum import launch_split_sum
from lora_core.kernels.tables import seed_or_none
from lora_core.kernels.tile import dot, keep, meet, round_to, widen
from lora_core.kernels.variant import DTYPE_PAIRS, TYPES, Variant, least_that_holds
from lora_core.reference.dropout import threshold

# columns of a program, rows of a step and ranks of a program, by the dtype of T and B; fewer rows and ranks where
# elements are loaded one by one, whose addresses take the registers
BLOCK_C = {torch.float32: 64, torch.float16: 128, torch.bfloat16: 128}
BLOCK_M = {torch.float32: 32, torch.float16: 64, torch.bfloat16: 64}
BLOCK_R = {torch.float32: (16,), torch.float16: (16, 64), torch.bfloat16: (16, 64)}
LOOSE_M, LOOSE_R = 32, {torch.float32: (16,), torch.float16: (16, 32), torch.bfloat16: (16, 32)}
# what keeps every configuration in registers
WARPS, MORE_WARPS = 4, 8
STAGES = 3
# rows of a part of a split sum at least
SHORTEST = 256


class RowSums(NamedTuple):
    """What launch_row_sum returns: P, and, where asked for, d_bias [C] and d_s [M, R]."""

    product: Tensor
    d_bias: Tensor | None
    d_s: Tensor | None


def _row_sum_kernel(
    d_ptr,
    t_ptr,
    b_ptr,
    seed_ptr,
    product_ptr,
    bias_ptr,
    hidden_ptr,
    M,
    C,
    R,
    stride_dm,
    stride_dc,
    stride_bc,
    stride_br,
    stride_pc,
    stride_pr,
    rows_per_split,
    factor,
    threshold: tl.int64,
    DROPOUT: tl.constexpr,
    BIAS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tile, split = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    column = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    rank = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column_ok, rank_ok = column < C, rank < R
    low: tl.constexpr = t_ptr.dtype.element_ty
    if HIDDEN:
        b = tl.load(
            b_ptr + column[:, None] * stride_bc + rank[None, :] * stride_br,
            mask=column_ok[:, None] & rank_ok[None, :],
            other=0.0,
        )
    # tensor cores make P^T, whose right side D is loaded by asynchronous copies as it lies; multiply-adds one by one
    # make P, which takes fewer registers
    if low == tl.float32:
        product = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    else:
        product = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    bias = tl.zeros((BLOCK_C,), tl.float32)
    first = tl.program_id(2) * rows_per_split
    for m in range(first, tl.minimum(first + rows_per_split, M), BLOCK_M):
        row = (m + tl.arange(0, BLOCK_M)).to(tl.int64)
        row_ok = row < M
        d = tl.load(
            d_ptr + row[:, None] * stride_dm + column[None, :] * stride_dc,
            mask=row_ok[:, None] & column_ok[None, :],
            other=0.0,
        )
        t = tl.load(t_ptr + row[:, None] * R + rank[None, :], mask=row_ok[:, None] & rank_ok[None, :], other=0.0)
        if BIAS:
            bias += tl.sum(widen(d), axis=0)
        d = meet(d, low)
        if HIDDEN:
            hidden = dot(d, b, tl.zeros((BLOCK_M, BLOCK_R), tl.float32))
            place = (tile * M + row)[:, None] * R + rank[None, :]
            tl.store(hidden_ptr + place, hidden, mask=row_ok[:, None] & rank_ok[None, :])
        if DROPOUT:
            d = tl.where(keep(seed_ptr, row, column, threshold), d, 0.0)
        product = dot(tl.trans(d), t, product) if low == tl.float32 else dot(tl.trans(t), d, product)
    if low != tl.float32:
        product = tl.trans(product)
    place = split * C * R + column[:, None] * stride_pc + rank[None, :] * stride_pr
    total = round_to(product * factor, product_ptr.dtype.element_ty)
    tl.store(product_ptr + place, total, mask=column_ok[:, None] & rank_ok[None, :])
    if BIAS:
        # every program of a column's ranks has the same sum
        tl.store(bias_ptr + split * C + column, bias, mask=column < tl.where(tl.program_id(1) == 0, C, 0))


# by whether P^T is written, and kind: rows of D, and of T and B where ranks are a multiple of 16 too
_ROWS, _SIZES = ("stride_dc", "stride_br"), ("C", "stride_dm")
_FORMS = {
    (False, ""): form(_row_sum_kernel, (*_ROWS, "stride_pr"), (*_SIZES, "R", "stride_bc", "stride_pc"), addresses=True),
    (False, "narrow"): form(_row_sum_kernel, (*_ROWS, "stride_pr"), _SIZES, addresses=True),
    (True, ""): form(_row_sum_kernel, (*_ROWS, "stride_pc"), (*_SIZES, "R", "stride_bc", "stride_pr"), addresses=True),
    (True, "narrow"): form(_row_sum_kernel, (*_ROWS, "stride_pc"), (*_SIZES, "stride_pr"), addresses=True),
    **dict.fromkeys(((False, "loose"), (True, "loose")), form(_row_sum_kernel)),
}


def variants() -> Iterator[Variant]:
    """Every configuration the launch can choose. "narrow": of ranks that are no multiple of 16."""
    # dA comes transposed; dB with what else depends on dL/dy
    uses = ("transposed", "transposed dropout", "", "hidden", "bias", "bias hidden")
    for (dtype, low), use, kind in itertools.product(DTYPE_PAIRS, uses, ("", "narrow", "loose")):
        for block_r, split in itertools.product(_ranks(low, kind), (False, True)):
            # the parts are float32 in any case; d_s of more ranks would need a second read of D after all
            if (split and low == torch.float32) or ("hidden" in use and block_r > BLOCK_R[low][0]):
                continue
            yield Variant(
                name=" ".join(filter(None, (TYPES[dtype], TYPES[low], f"rank {block_r}", use, "split" * split, kind))),
                form=_FORMS["transposed" in use, kind],
                types={
                    "d_ptr": f"*{TYPES[dtype]}",
                    **dict.fromkeys(("t_ptr", "b_ptr"), f"*{TYPES[low]}"),
                    "seed_ptr": "*i64",
                    "product_ptr": "*fp32" if split else f"*{TYPES[low]}",
                    # where they are not asked for, the product is passed
                    "bias_ptr": "*fp32" if split or "bias" in use else f"*{TYPES[low]}",
                    "hidden_ptr": "*fp32" if split or "hidden" in use else f"*{TYPES[low]}",
                    "factor": "fp32",
                    "threshold": "i64",
                },
                constants={
                    "DROPOUT": "dropout" in use,
                    "BIAS": "bias" in use,
                    "HIDDEN": "hidden" in use,
                    "BLOCK_C": BLOCK_C[low],
                    "BLOCK_M": _rows(low, kind),
                    "BLOCK_R": block_r,
                },
                options=_options(dtype, low, block_r, "hidden" in use, kind),
                # the rows of P^T are ranks, those of d_s rows of D
                tile_m=0 if low == torch.float32 else max(block_r, _rows(low, kind) if "hidden" in use else 0),
            )


def _kind(d: Tensor, t: Tensor, b: Tensor | None) -> str:
    if not in_wide_loads(d) or not begins_aligned(t, b) or (b is not None and b.stride(1) != 1):
        return "loose"
    return "narrow" if (t.shape[1] | (0 if b is None else b.stride(0))) % ALIGNMENT else ""


def _rows(low: torch.dtype, kind: str) -> int:
    """Return the rows of a step."""
    return LOOSE_M if kind == "loose" else BLOCK_M[low]


def _ranks(low: torch.dtype, kind: str) -> tuple[int, ...]:
    """Return what ranks a program may have."""
    return LOOSE_R[low] if kind == "loose" else BLOCK_R[low]


def _options(dtype: torch.dtype, low: torch.dtype, block_r: int, hidden: bool, kind: str) -> dict[str, Any]:
    """Return warps and stages: more warps where ranks are many, or addresses of single elements take registers."""
    more = block_r > 16 or (kind == "loose" and low != torch.float32) or (kind and hidden and dtype == low)
    return {"num_warps": MORE_WARPS if more else WARPS, "num_stages": STAGES, "enable_fp_fusion": True}


def launch_row_sum(
    d: Tensor,
    t: Tensor,
    factor: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    shrink_by: Tensor | None = None,
    bias: bool = False,
    transposed: bool = False,
    splits: int | None = None,
) -> RowSums:
    """Run the kernel; any strides of d and shrink_by. Copies a T that is not contiguous.

    Args:
        d: D, float32, float16 or bfloat16, shape [M, C].
        t: T, dtype of d or float32, shape [M, R].
        factor: multiplies both products.
        dropout: probability of zeroing an element of D in P, in [0, 1); with transposed alone.
        seed: int64, one element; needed where dropout > 0.
        shrink_by: B, dtype of t, shape [C, R], to have d_s as well.
        bias: whether to have the column sums as well; neither they nor d_s with transposed.
        transposed: whether to have P^T, shape [R, C].
        splits: parts of the sum over rows; by default as many as fill the device.
    Returns:
        product [C, R] or [R, C] in the dtype of t, d_bias in that of d, d_s in that of t.
    """
    # rows of T are taken to lie one behind the other
    t = t.contiguous()
    (m, c), r = d.shape, t.shape[1]
    low, kind = t.dtype, _kind(d, t, shrink_by)
    ranks = _ranks(low, kind)
    block_r = least_that_holds(r, ranks) if shrink_by is None else ranks[0]
    # without ranks there are column sums still
    grid_c, grid_r = triton.cdiv(c, BLOCK_C[low]), triton.cdiv(max(r, 1), block_r)
    splits = splits or splits_to_fill(d.device, grid_c * grid_r, m, SHORTEST)
    block_m = _rows(low, kind)
    rows_per_split = triton.cdiv(triton.cdiv(max(m, 1), splits), block_m) * block_m
    splits = triton.cdiv(max(m, 1), rows_per_split)
    shape = (r, c) if transposed else (c, r)
    product = d.new_empty(shape if splits == 1 else (splits, *shape), dtype=low if splits == 1 else torch.float32)
    d_bias = d.new_empty((splits, c), dtype=torch.float32) if bias else None
    d_s = None if shrink_by is None else d.new_empty((grid_c, m, r), dtype=torch.float32)
    scale = factor / (1 - dropout)
    if c:
        with torch.cuda.device_of(d):
            _FORMS[transposed, kind][(grid_c, grid_r, splits)](
                d,
                t,
                t if shrink_by is None else shrink_by,
                seed_or_none(seed, dropout, d.device),
                product,
                product if d_bias is None else d_bias,
                product if d_s is None else d_s,
                m,
                c,
                r,
                *d.stride(),
                *((0, 1) if shrink_by is None else shrink_by.stride()),
                *((1, c) if transposed else (r, 1)),
                rows_per_split,
                scale if splits == 1 else 1.0,
                threshold(dropout),
                DROPOUT=dropout > 0,
                BIAS=bias,
                HIDDEN=shrink_by is not None,
                BLOCK_C=BLOCK_C[low],
                BLOCK_M=block_m,
                BLOCK_R=block_r,
                **_options(d.dtype, low, block_r, shrink_by is not None, kind),
            )
    return RowSums(
        product if splits == 1 else launch_split_sum(product, low, scale),
        None if d_bias is None else launch_split_sum(d_bias, d.dtype),
        None if d_s is None else launch_split_sum(d_s, low, factor),
    )
