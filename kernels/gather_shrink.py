"""Triton kernel for the way down of grouped_lora: each row by its own adapter's A, or its gradient by B.

    S_m = x_m A_g^T,  dS_m = s_g G_m B_g + what reaches S by another way

Reads x once for each BLOCK_R ranks of the row's own adapter. A step of grouped_lora.

Reference: lora_core/reference/grouped.py
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.form import Form, begins_aligned, form, in_wide_loads
from lora_core.kernels.groups import (
    BLOCK_C,
    BLOCK_M,
    BLOCK_R,
    Groups,
    options,
    rank_offsets,
    tile_of_group,
    types,
)
from lora_core.kernels.tile import dot, meet, round_to
from lora_core.kernels.variant import DTYPE_PAIRS, TYPES, Variant, least_that_holds

# of elements that are loaded one by one, what keeps every configuration in registers: columns of a step, warps, and
# steps whose loads are in flight
LOOSE_C, LOOSE_WARPS, LOOSE_STAGES = 64, 8, 3


def _gather_shrink_kernel(
    x_ptr,
    p_ptr,
    scaling_ptr,
    s_ptr,
    order_ptr,
    starts_ptr,
    tile_ends_ptr,
    s_ends_ptr,
    offsets_ptr,
    G,
    C,
    stride_xm,
    stride_xc,
    stride_pr,
    stride_pc,
    SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """S = factor x P^T for rows of x [M, C] and each group's rows of P [., C]."""
    group, row, row_ok, stored, offset, ranks = tile_of_group(
        order_ptr, starts_ptr, tile_ends_ptr, s_ends_ptr, offsets_ptr, G, BLOCK_M
    )
    rank = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    rank_ok = rank < ranks
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    # a group of fewer ranks has no work in this program
    for c in range(0, tl.where(tl.program_id(1) * BLOCK_R < ranks, C, 0), BLOCK_C):
        column = c + tl.arange(0, BLOCK_C)
        column_ok = column < C
        x = tl.load(
            x_ptr + row[:, None] * stride_xm + column.to(tl.int64)[None, :] * stride_xc,
            mask=row_ok[:, None] & column_ok[None, :],
            other=0.0,
        )
        p = tl.load(
            p_ptr + (offset + rank)[None, :] * stride_pr + column.to(tl.int64)[:, None] * stride_pc,
            mask=rank_ok[None, :] & column_ok[:, None],
            other=0.0,
        )
        acc = dot(meet(x, p_ptr.dtype.element_ty), p, acc)
    if SCALED:
        # without ranks there is nothing to scale, by infinity neither
        acc *= tl.load(scaling_ptr + group, mask=ranks > 0, other=0.0)
    place = stored[:, None] + rank[None, :]
    ok = row_ok[:, None] & rank_ok[None, :]
    tl.store(s_ptr + place, round_to(acc, s_ptr.dtype.element_ty), mask=ok)


# rows of x, and of A; or, scaled, rows of x and ranks of B^T, in any number
_WIDE = form(_gather_shrink_kernel, ("stride_xc", "stride_pc"), ("C", "stride_xm", "stride_pr"), addresses=True)
_TRANSPOSED = form(_gather_shrink_kernel, ("stride_xc", "stride_pr"), ("C", "stride_xm"), addresses=True)
_LOOSE = form(_gather_shrink_kernel)
_FORMS = {"": _WIDE, "transposed": _TRANSPOSED, "loose": _LOOSE}


def variants() -> Iterator[Variant]:
    """Every configuration the launch can choose."""
    uses = ("", "scaled")
    for (dtype, low), use, (kind, taken) in itertools.product(DTYPE_PAIRS, uses, _FORMS.items()):
        if (kind == "transposed") != ("scaled" in use) and kind != "loose":
            continue
        for ranks in BLOCK_R[low]:
            scaled = "scaled" in use
            yield Variant(
                name=" ".join(filter(None, (f"{TYPES[dtype]} {TYPES[low]} rank {ranks}", use, kind))),
                form=taken,
                types={**types(dtype, low), "scaling_ptr": "*fp32" if scaled else "*i64"},
                constants={
                    "SCALED": scaled,
                    "BLOCK_M": BLOCK_M,
                    "BLOCK_C": _columns(taken, low),
                    "BLOCK_R": ranks,
                },
                options=_options(taken, low),
                tile_m=0 if low == torch.float32 else BLOCK_M,
            )


def _form(x: Tensor, p: Tensor, scaled: bool) -> Form:
    taken = _TRANSPOSED if scaled else _WIDE
    fits = p.stride(0) == 1 if scaled else in_wide_loads(p)
    return taken if fits and in_wide_loads(x) and begins_aligned(p) else _LOOSE


def _columns(taken: Form, low: torch.dtype) -> int:
    return LOOSE_C if taken is _LOOSE else BLOCK_C[low]


def _options(taken: Form, low: torch.dtype) -> dict[str, Any]:
    if taken is not _LOOSE:
        return options()
    return options(LOOSE_STAGES) if low == torch.float32 else options(warps=LOOSE_WARPS)


def launch_gather_shrink(
    x: Tensor,
    p: Tensor,
    found: Groups,
    ranks: Sequence[int],
    scaling: Tensor | None,
    out: Tensor,
) -> None:
    """Run the kernel; any strides of x and p.

    Args:
        x: float32, float16 or bfloat16, shape [M, C].
        p: the adapters' A one below the other, or B^T: dtype of x or float32, shape [sum of ranks, C].
        found: which rows belong to which adapter.
        ranks: of the adapters.
        scaling: float32, one for each adapter, contiguous; None for 1.
        out: written but for what lies behind the last row: S or dL/dS as stored, dtype of p, shape [M max rank],
            contiguous.
    """
    if not out.numel():
        return
    low = p.dtype
    ranks_of_program = least_that_holds(max(ranks), BLOCK_R[low])
    taken = _form(x, p, scaling is not None)
    with torch.cuda.device_of(x):
        taken[(found.tiles, triton.cdiv(max(ranks), ranks_of_program))](
            x,
            p,
            found.starts if scaling is None else scaling,
            out,
            *found[:4],
            rank_offsets(tuple(ranks), x.device),
            len(ranks),
            x.shape[1],
            *x.stride(),
            *p.stride(),
            SCALED=scaling is not None,
            BLOCK_M=BLOCK_M,
            BLOCK_C=_columns(taken, low),
            BLOCK_R=ranks_of_program,
            **_options(taken, low),
        )
