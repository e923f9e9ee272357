"""Triton kernel for the way down of grouped_lora: each row by its own adapter's A, or its gradient by B.

    S_m = x_m A_g^T,  dS_m = s_g G_m B_g + what reaches S by another way

Reads x once for each BLOCK_R ranks of the row's own adapter. A step of grouped_lora.

Reference: lora_core/reference/grouped.py
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.groups import (
    BLOCK_C,
    BLOCK_M,
    BLOCK_R,
    SEARCHED,
    STAGES,
    WARPS,
    Groups,
    block_r,
    rank_offsets,
    tile_of_group,
    variant,
)
from lora_core.kernels.tile import dot, meet, round_to, widen
from lora_core.kernels.variant import DTYPE_PAIRS, TYPES, Variant


@triton.jit(do_not_specialize=["G", "R"])
def _gather_shrink_kernel(
    x_ptr,
    p_ptr,
    add_ptr,
    scaling_ptr,
    s_ptr,
    order_ptr,
    starts_ptr,
    tile_ends_ptr,
    offsets_ptr,
    G,
    C,
    R,
    stride_xm,
    stride_xc,
    stride_pr,
    stride_pc,
    SCALED: tl.constexpr,
    ADD: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """S [M, R] = factor x P^T + add for rows of x [M, C] and each group's rows of P [., C]."""
    group, row, row_ok, offset, ranks = tile_of_group(
        order_ptr, starts_ptr, tile_ends_ptr, offsets_ptr, G, GROUPS, BLOCK_M
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
        acc *= tl.load(scaling_ptr + group, mask=group < G, other=0.0)
    place = row[:, None] * R + rank[None, :]
    ok = row_ok[:, None] & rank_ok[None, :]
    if ADD:
        acc += widen(tl.load(add_ptr + place, mask=ok, other=0.0))
    tl.store(s_ptr + place, round_to(acc, s_ptr.dtype.element_ty), mask=ok)


def variants() -> Iterator[Variant]:
    """Every configuration the launch can choose but for the number of adapters, last dimensions contiguous."""
    # forward with A, backward with B^T: what is contiguous changes places
    uses = (
        ("", "stride_pr", "stride_pc"),
        ("scaled", "stride_pc", "stride_pr"),
        ("scaled added", "stride_pc", "stride_pr"),
    )
    for (dtype, low), searched, (use, long, unit) in itertools.product(DTYPE_PAIRS, SEARCHED, uses):
        for ranks in BLOCK_R[low]:
            constants = {"SCALED": "scaled" in use, "ADD": "added" in use, "stride_xc": 1, unit: 1}
            constants |= {"GROUPS": searched, "BLOCK_M": BLOCK_M, "BLOCK_C": BLOCK_C[low], "BLOCK_R": ranks}
            name = f"{TYPES[dtype]} {TYPES[low]} rank {ranks} of {searched} {use}".strip()
            yield variant(name, _gather_shrink_kernel, dtype, low, constants, ("stride_xm", long))


def launch_gather_shrink(
    x: Tensor, p: Tensor, found: Groups, ranks: Sequence[int], scaling: Tensor | None, add: Tensor | None = None
) -> Tensor:
    """Run the kernel; any strides.

    Args:
        x: float32, float16 or bfloat16, shape [M, C].
        p: the adapters' A one below the other, or B^T: dtype of x or float32, shape [sum of ranks, C].
        found: which rows belong to which adapter.
        ranks: of the adapters.
        scaling: float32, one for each adapter, contiguous; None for 1.
        add: dtype of p, shape [M, max rank], added; or None.
    Returns:
        Shape [M, max rank], dtype of p; 0 where an adapter has fewer ranks.
    """
    count, widest, low = len(ranks), max(ranks, default=0), p.dtype
    s = x.new_zeros(len(x), widest, dtype=low)
    if s.numel():
        ranks_of_program = block_r(ranks, low)
        with torch.cuda.device_of(x):
            _gather_shrink_kernel[(found.tiles, triton.cdiv(widest, ranks_of_program))](
                x,
                p,
                s if add is None else add.contiguous(),
                found.starts if scaling is None else scaling,
                s,
                *found[:3],
                rank_offsets(tuple(ranks), x.device),
                count,
                x.shape[1],
                widest,
                *x.stride(),
                *p.stride(),
                SCALED=scaling is not None,
                ADD=add is not None,
                GROUPS=triton.next_power_of_2(count + 1),
                BLOCK_M=BLOCK_M,
                BLOCK_C=BLOCK_C[low],
                BLOCK_R=ranks_of_program,
                num_warps=WARPS,
                num_stages=STAGES,
            )
    return s
