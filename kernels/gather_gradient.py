"""Triton kernel for the gradients of the matrices of grouped_lora: a sum over each adapter's own rows.

    dA_g = sum dS_m^T x_m,  dB_g = s_g sum G_m^T S_m

One program sums a tile in the order of the rows: no atomics, the same bits every time. A step of grouped_lora.

Reference: lora_core/reference/grouped.py
"""

import itertools
from collections.abc import Iterator, Sequence

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
    begin_of_group,
    options,
    rank_chunks,
    rank_offsets,
    types,
)
from lora_core.kernels.tile import dot, meet, round_to
from lora_core.kernels.variant import DTYPE_PAIRS, TYPES, Variant, least_that_holds

# ranks of a program where elements are loaded one by one, which could not feed the products of a large tile
LOOSE_R = {torch.float32: (16,), torch.float16: (16, 32), torch.bfloat16: (16, 32)}


def _gather_gradient_kernel(
    t_ptr,
    d_ptr,
    scaling_ptr,
    out_ptr,
    order_ptr,
    starts_ptr,
    s_ends_ptr,
    offsets_ptr,
    chunks_ptr,
    C,
    stride_dm,
    stride_dc,
    stride_or,
    stride_oc,
    SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out [., C] = factor T^T D over each group's rows of T, stored as S is, and of D [M, C]."""
    group = tl.load(chunks_ptr + tl.program_id(0) * 2)
    rank = tl.load(chunks_ptr + tl.program_id(0) * 2 + 1) + tl.arange(0, BLOCK_R)
    offset = tl.load(offsets_ptr + group)
    ranks = tl.load(offsets_ptr + group + 1) - offset
    rank_ok = rank < ranks
    column = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    column_ok = column < C
    first, end = tl.load(starts_ptr + group).to(tl.int32), tl.load(starts_ptr + group + 1).to(tl.int32)
    t_ptr += begin_of_group(s_ends_ptr, group)
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for m in range(first, end, BLOCK_M):
        place = m + tl.arange(0, BLOCK_M)
        row_ok = place < end
        row = tl.load(order_ptr + place, mask=row_ok, other=0)
        stored = (place - first) * ranks
        t = tl.load(t_ptr + stored[None, :] + rank[:, None], mask=rank_ok[:, None] & row_ok[None, :], other=0.0)
        d = tl.load(
            d_ptr + row[:, None] * stride_dm + column[None, :] * stride_dc,
            mask=row_ok[:, None] & column_ok[None, :],
            other=0.0,
        )
        acc = dot(t, meet(d, t_ptr.dtype.element_ty), acc)
    if SCALED:
        # without rows there is nothing to scale, by infinity neither
        acc *= tl.load(scaling_ptr + group, mask=first < end, other=0.0)
    tl.store(
        out_ptr + (offset + rank)[:, None] * stride_or + column[None, :] * stride_oc,
        round_to(acc, out_ptr.dtype.element_ty),
        mask=rank_ok[:, None] & column_ok[None, :],
    )


# rows of D, and of the result dA; or, scaled, rows of D and, of dB^T, ranks in any number
_ROWS = ("C", "stride_dm")
_WIDE = form(_gather_gradient_kernel, ("stride_dc", "stride_oc"), (*_ROWS, "stride_or"), addresses=True)
_TRANSPOSED = form(_gather_gradient_kernel, ("stride_dc", "stride_or"), _ROWS, addresses=True)
_LOOSE = form(_gather_gradient_kernel)
_FORMS = {"": _WIDE, "scaled transposed": _TRANSPOSED, "loose": _LOOSE, "scaled loose": _LOOSE}


def variants() -> Iterator[Variant]:
    """Every configuration the launch can choose."""
    for (dtype, low), (use, taken) in itertools.product(DTYPE_PAIRS, _FORMS.items()):
        for ranks in _ranks(taken, low):
            scaled = "scaled" in use
            yield Variant(
                name=f"{TYPES[dtype]} {TYPES[low]} rank {ranks} {use}".strip(),
                form=taken,
                types={**types(dtype, low), "scaling_ptr": "*fp32" if scaled else "*i64"},
                constants={"SCALED": scaled, "BLOCK_M": BLOCK_M, "BLOCK_C": BLOCK_C[low], "BLOCK_R": ranks},
                options=options(),
                # its rows are ranks
                tile_m=0 if low == torch.float32 else ranks,
            )


def _ranks(taken: Form, low: torch.dtype) -> tuple[int, ...]:
    return (LOOSE_R if taken is _LOOSE else BLOCK_R)[low]


def _form(t: Tensor, d: Tensor, scaled: bool, out: Tensor) -> Form:
    taken = _TRANSPOSED if scaled else _WIDE
    fits = out.stride(0) == 1 if scaled else in_wide_loads(out)
    return taken if fits and in_wide_loads(d) and begins_aligned(t, out) else _LOOSE


def launch_gather_gradient(
    t: Tensor, d: Tensor, found: Groups, ranks: Sequence[int], scaling: Tensor | None, out: Tensor
) -> None:
    """Run the kernel; any strides of d and out.

    Args:
        t: S or dS as stored, shape [M max rank], contiguous.
        d: dL/dy or x, the dtype of t or half precision under float32, shape [M, C].
        found: which rows belong to which adapter.
        ranks: of the adapters.
        scaling: float32, one for each adapter, contiguous; None for 1.
        out: written, dtype of t, shape [sum of ranks, C].
    """
    if not out.numel():
        return
    low = t.dtype
    taken = _form(t, d, scaling is not None, out)
    ranks_of_program = least_that_holds(max(ranks), _ranks(taken, low))
    chunks = rank_chunks(tuple(ranks), ranks_of_program, t.device)
    with torch.cuda.device_of(t):
        taken[(len(chunks), triton.cdiv(d.shape[1], BLOCK_C[low]))](
            t,
            d,
            found.starts if scaling is None else scaling,
            out,
            found.order,
            found.starts,
            found.s_ends,
            rank_offsets(tuple(ranks), t.device),
            chunks,
            d.shape[1],
            *d.stride(),
            *out.stride(),
            SCALED=scaling is not None,
            BLOCK_M=BLOCK_M,
            BLOCK_C=BLOCK_C[low],
            BLOCK_R=ranks_of_program,
            **options(),
        )
