"""Triton kernel for a skinny product, with dropout inside: the low-rank path's way down.

    S = factor drop(x) A^T        x [M, K], A [R, K], S [M, R]

With x = dL/dy and A = B^T it is the backward's dL/dS = s (dL/dy) B. A step of lora_linear.

Reads x once for each BLOCK_R ranks: bound by memory. Where M alone does not fill the device, the sum over K is split,
and the parts are added in a fixed order (split_sum.py). The mask is a hash of (seed, row, column), so it needs no
memory, and 1 / (1 - p) multiplies the sum instead of each element.

Reference: lora_core/reference/lora.py, lora_core/reference/dropout.py
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.form import Form, begins_aligned, form, in_wide_loads
from lora_core.kernels.processors import splits_to_fill
from lora_core.kernels.split_sum import launch_split_sum
from lora_core.kernels.tables import seed_or_none
from lora_core.kernels.tile import dot, keep, meet, round_to
from lora_core.kernels.variant import DTYPE_PAIRS, TYPES, Variant, least_that_holds
from lora_core.reference.dropout import threshold

# rows of a tile, by the rows there are: 64 are the least that wgmma takes, and more than tensor cores can be fed with
# where elements are loaded one by one
BLOCK_M, LOOSE_HALF_M = (16, 64), (16, 32)
# columns of a step and ranks of a tile, by A's dtype
BLOCK_K = {torch.float32: 32, torch.float16: 64, torch.bfloat16: 64}
BLOCK_R = {torch.float32: (16,), torch.float16: (16, 64, 128), torch.bfloat16: (16, 64, 128)}
# warps by ranks of a tile: what keeps every configuration in registers, and where x is loaded element by element,
# whose addresses take more of them
WARPS, LOOSE_WARPS, LOOSE_FLOAT32_WARPS = {16: 4, 64: 4, 128: 8}, {16: 4, 64: 8, 128: 8}, 8
# steps whose loads are in flight, by ranks of a tile: what 99 KiB of shared memory hold, all that a program can have on
# compute capability 8.6, 8.9 and 12.0
STAGES = {16: 5, 64: 5, 128: 4}
# terms of a part of a split sum at least
SHORTEST = 256


def _shrink_kernel(
    x_ptr,
    a_ptr,
    seed_ptr,
    s_ptr,
    M,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    k_per_split,
    factor,
    threshold: tl.int64,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rank = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    # a multiple of BLOCK_K, so that only the end of K needs a mask
    first = split * k_per_split
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(first, tl.minimum(first + k_per_split, K), BLOCK_K):
        column = k + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + row[:, None] * stride_xm + column.to(tl.int64)[None, :] * stride_xk,
            mask=(row < M)[:, None] & (column < K)[None, :],
            other=0.0,
        )
        a = tl.load(
            a_ptr + rank[None, :] * stride_ar + column.to(tl.int64)[:, None] * stride_ak,
            mask=(rank < R)[None, :] & (column < K)[:, None],
            other=0.0,
        )
        if DROPOUT:
            x = tl.where(keep(seed_ptr, row, column, threshold), x, 0.0)
        acc = dot(meet(x, a_ptr.dtype.element_ty), a, acc)
    place = (split.to(tl.int64) * M + row)[:, None] * R + rank[None, :]
    tl.store(
        s_ptr + place, round_to(acc * factor, s_ptr.dtype.element_ty), mask=(row < M)[:, None] & (rank < R)[None, :]
    )


# rows of x and of A; rows of x and, in the backward, ranks of A = B^T, of which there may be any number
_WIDE = form(_shrink_kernel, ("stride_xk", "stride_ak"), ("K", "stride_xm", "stride_ar", "k_per_split"), addresses=True)
_TRANSPOSED = form(_shrink_kernel, ("stride_xk", "stride_ar"), ("K", "stride_xm", "k_per_split"), addresses=True)
_LOOSE = form(_shrink_kernel)
# by what a launch is for
_FORMS = {"": _WIDE, " dropout": _WIDE, " transposed": _TRANSPOSED, " loose": _LOOSE, " loose dropout": _LOOSE}


def variants() -> Iterator[Variant]:
    """Every configuration the launch can choose."""
    for (dtype, low), (use, taken) in itertools.product(DTYPE_PAIRS, _FORMS.items()):
        for block_m, block_r, split in itertools.product(_rows(taken, low), BLOCK_R[low], (False, True)):
            if split and low == torch.float32:
                # the parts are float32 in any case
                continue
            yield Variant(
                name=f"{TYPES[dtype]} {TYPES[low]} {block_m}x{block_r}{use}{' split' * split}",
                form=taken,
                types={
                    "x_ptr": f"*{TYPES[dtype]}",
                    "a_ptr": f"*{TYPES[low]}",
                    "seed_ptr": "*i64",
                    "s_ptr": "*fp32" if split else f"*{TYPES[low]}",
                    "factor": "fp32",
                    "threshold": "i64",
                },
                constants={
                    "DROPOUT": use.endswith("dropout"),
                    "BLOCK_M": block_m,
                    "BLOCK_K": BLOCK_K[low],
                    "BLOCK_R": block_r,
                },
                options=_options(taken, low, block_r),
                tile_m=block_m if low != torch.float32 else 0,
            )


def _form(x: Tensor, lora_a: Tensor, dropout: float) -> Form:
    if not in_wide_loads(x):
        return _LOOSE
    if in_wide_loads(lora_a):
        return _WIDE
    return _TRANSPOSED if lora_a.stride(0) == 1 and begins_aligned(lora_a) and not dropout else _LOOSE


def _rows(taken: Form, low: torch.dtype) -> tuple[int, ...]:
    return LOOSE_HALF_M if taken is _LOOSE and low != torch.float32 else BLOCK_M


def _options(taken: Form, low: torch.dtype, block_r: int) -> dict[str, Any]:
    warps = (LOOSE_WARPS if taken is _LOOSE else WARPS)[block_r]
    if taken is _LOOSE and low == torch.float32:
        warps = LOOSE_FLOAT32_WARPS
    return {"num_warps": warps, "num_stages": STAGES[block_r], "enable_fp_fusion": True}


def launch_shrink(
    x: Tensor,
    lora_a: Tensor,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    factor: float = 1.0,
    splits: int | None = None,
) -> Tensor:
    """Run the kernel; any strides.

    Args:
        x: float32, float16 or bfloat16, shape [M, K].
        lora_a: dtype of x or float32, shape [R, K].
        dropout: probability of zeroing an element of x, in [0, 1).
        seed: int64, one element; needed where dropout > 0.
        factor: multiplies the product.
        splits: parts of the sum; by default as many as fill the device.
    Returns:
        Shape [M, R], dtype of lora_a.
    """
    (m, k), r = x.shape, lora_a.shape[0]
    low = lora_a.dtype
    taken = _form(x, lora_a, dropout)
    block_m = least_that_holds(m, _rows(taken, low))
    block_r = least_that_holds(r, BLOCK_R[low])
    tiles = triton.cdiv(m, block_m) * triton.cdiv(r, block_r)
    splits = splits or splits_to_fill(x.device, tiles, k, SHORTEST)
    k_per_split = triton.cdiv(triton.cdiv(max(k, 1), splits), BLOCK_K[low]) * BLOCK_K[low]
    splits = triton.cdiv(max(k, 1), k_per_split)
    together = splits == 1
    s = x.new_empty((m, r) if together else (splits, m, r), dtype=low if together else torch.float32)
    factor = factor / (1 - dropout)
    if s.numel():
        with torch.cuda.device_of(x):
            taken[(triton.cdiv(m, block_m), triton.cdiv(r, block_r), splits)](
                x,
                lora_a,
                seed_or_none(seed, dropout, x.device),
                s,
                m,
                k,
                r,
                *x.stride(),
                *lora_a.stride(),
                k_per_split,
                float(factor) if together else 1.0,
                threshold(dropout),
                DROPOUT=dropout > 0,
                BLOCK_M=block_m,
                BLOCK_K=BLOCK_K[low],
                BLOCK_R=block_r,
                **_options(taken, low, block_r),
            )
    return s if together else launch_split_sum(s, low, factor)
