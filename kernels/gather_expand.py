"""Triton kernel for the way up of grouped_lora: each row by its own adapter's B, or its gradient by A.

    y_m = base_m + s_g S_m B_g^T,  dx_m = dS_m A_g

A row without an adapter gets its base, or 0. A step of grouped_lora.

Reference: lora_core/reference/grouped.py
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.form import ALIGNMENT, Form, begins_aligned, form, in_wide_loads
from lora_core.kernels.groups import (
    BLOCK_C,
    BLOCK_M,
    Groups,
    options,
    rank_offsets,
    tile_of_group,
    types,
)
from lora_core.kernels.tile import dot, round_to, widen
from lora_core.kernels.variant import DTYPE_PAIRS, TYPES, Variant

# ranks of a step
BLOCK_R = 16


def _gather_expand_kernel(
    s_ptr,
    p_ptr,
    base_ptr,
    scaling_ptr,
    y_ptr,
    order_ptr,
    starts_ptr,
    tile_ends_ptr,
    s_ends_ptr,
    offsets_ptr,
    G,
    C,
    stride_pr,
    stride_pc,
    stride_base_m,
    stride_base_c,
    SCALED: tl.constexpr,
    BASE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y [M, C] = base + factor S P for rows of S and each group's rows of P [., C]."""
    group, row, row_ok, stored, offset, ranks = tile_of_group(
        order_ptr, starts_ptr, tile_ends_ptr, s_ends_ptr, offsets_ptr, G, BLOCK_M
    )
    column = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    column_ok = column < C
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    # few steps: loads in flight would cost registers
    for r in tl.range(0, ranks, BLOCK_R, num_stages=1):
        rank = r + tl.arange(0, BLOCK_R)
        rank_ok = rank < ranks
        s = tl.load(s_ptr + stored[:, None] + rank[None, :], mask=row_ok[:, None] & rank_ok[None, :], other=0.0)
        p = tl.load(
            p_ptr + (offset + rank)[:, None] * stride_pr + column[None, :] * stride_pc,
            mask=rank_ok[:, None] & column_ok[None, :],
            other=0.0,
        )
        acc = dot(s, p, acc)
    if SCALED:
        # without ranks there is nothing to scale, by infinity neither
        acc *= tl.load(scaling_ptr + group, mask=ranks > 0, other=0.0)
    ok = row_ok[:, None] & column_ok[None, :]
    if BASE:
        base = base_ptr + row[:, None] * stride_base_m + column[None, :] * stride_base_c
        acc += widen(tl.load(base, mask=ok, other=0.0))
    tl.store(y_ptr + row[:, None] * C + column[None, :], round_to(acc, y_ptr.dtype.element_ty), mask=ok)


# rows of A and of the base; or, scaled, ranks of B^T, in any number, and rows of the base
_ROWS = ("C", "stride_base_m")
_WIDE = form(_gather_expand_kernel, ("stride_base_c", "stride_pc"), (*_ROWS, "stride_pr"), addresses=True)
_TRANSPOSED = form(_gather_expand_kernel, ("stride_base_c", "stride_pr"), _ROWS, addresses=True)
_LOOSE = form(_gather_expand_kernel)
_FORMS = {"": _WIDE, "transposed": _TRANSPOSED, "loose": _LOOSE}


def variants() -> Iterator[Variant]:
    """Every configuration the launch can choose."""
    uses = ("", "scaled", "scaled base")
    for (dtype, low), use, (kind, taken) in itertools.product(DTYPE_PAIRS, uses, _FORMS.items()):
        scaled = "scaled" in use
        if (kind == "transposed") != scaled and kind != "loose":
            continue
        yield Variant(
            name=" ".join(filter(None, (f"{TYPES[dtype]} {TYPES[low]}", use, kind))),
            form=taken,
            types={**types(dtype, low), "scaling_ptr": "*fp32" if scaled else "*i64"},
            constants={
                "SCALED": scaled,
                "BASE": "base" in use,
                "BLOCK_M": BLOCK_M,
                "BLOCK_C": BLOCK_C[low],
                "BLOCK_R": BLOCK_R,
            },
            options=options(),
            tile_m=0 if low == torch.float32 else BLOCK_M,
        )


def _form(s: Tensor, p: Tensor, scaled: bool, base: Tensor | None) -> Form:
    taken = _TRANSPOSED if scaled else _WIDE
    fits = p.stride(0) == 1 and p.shape[1] % ALIGNMENT == 0 if scaled else in_wide_loads(p)
    return taken if fits and begins_aligned(s, p) and (base is None or in_wide_loads(base)) else _LOOSE


def launch_gather_expand(
    s: Tensor,
    p: Tensor,
    found: Groups,
    ranks: Sequence[int],
    scaling: Tensor | None,
    base: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Run the kernel; any strides of p and base.

    Args:
        s: S as stored, dtype of p, shape [M max rank], contiguous.
        p: the adapters' B^T one below the other, or A: shape [sum of ranks, C].
        found: which rows belong to which adapter.
        ranks: of the adapters.
        scaling: float32, one for each adapter, contiguous; None for 1.
        base: shape [M, C], added; or None.
        dtype: of the result.
    Returns:
        Shape [M, C].
    """
    count, columns, low = len(ranks), p.shape[1], p.dtype
    y = s.new_empty(len(found.order), columns, dtype=dtype)
    if y.numel():
        with torch.cuda.device_of(s):
            _form(s, p, scaling is not None, base)[(found.tiles, triton.cdiv(columns, BLOCK_C[low]))](
                s,
                p,
                y if base is None else base,
                found.starts if scaling is None else scaling,
                y,
                *found[:4],
                rank_offsets(tuple(ranks), s.device),
                count,
                columns,
                *p.stride(),
                *((0, 1) if base is None else base.stride()),
                SCALED=scaling is not None,
                BASE=base is not None,
                BLOCK_M=BLOCK_M,
                BLOCK_C=BLOCK_C[low],
                BLOCK_R=BLOCK_R,
                **options(),
            )
    return y
