"""Triton kernels for lora_core::dora_norm and nf4_dora_norm: row norms of W + s B A from one read of W.

    |V_n|^2 = |W_n|^2 + 2 s <B_n, (W A^T)_n>      here
            + s^2 B_n (A A^T) B_n^T               of size N R: by matrix products of PyTorch's

A program owns BLOCK_N rows of W and a range of columns; W dense, or decoded from NF4 in registers. Its part is a number
a row, so splitting the sum to fill the device costs next to nothing; the parts are added in a fixed order
(split_sum.py). Bound by memory: reads W once for each BLOCK_R ranks.

Reference: lora_core/reference/dora.py
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.form import begins_aligned, form, in_wide_loads
from lora_core.kernels.log import log_launch
from lora_core.kernels.nf4_levels import SHUFFLED
from lora_core.kernels.nf4_tile import ELEMENTS, argument_types, arguments, as_read, nf4_tile, per_scale, reading
from lora_core.kernels.processors import splits_to_fill
from lora_core.kernels.reach import left_to_reference, near
from lora_core.kernels.split_sum import launch_split_sum
from lora_core.kernels.tile import dot, meet, round_to, widen
from lora_core.kernels.variant import DTYPE_PAIRS, TYPES, Variant, least_that_holds
from lora_core.ops.dora_norm import nf4_op, op
from lora_core.ops.eager import register
from lora_core.ops.packed import Packed
from lora_core.reference import dora as reference

# rows and columns of W in a step, by A's dtype: a float32 product is unrolled into single multiply-adds
TILE = {torch.float32: (32, 32), torch.float16: (64, 64), torch.bfloat16: (64, 64)}
# where W is decoded or loaded element by element, which takes registers
SMALL_TILE = (32, 32)
BLOCK_R = {torch.float32: (16,), torch.float16: (16, 64), torch.bfloat16: (16, 64)}
# columns that share a scale, by how W is read; 0 where it is dense
PER_SCALE = {"dense": 0, "dense loose": 0, **per_scale(SMALL_TILE[1])}
WARPS = {"dense": 8, "dense loose": 4, "blocks": 4, "words": 4, ELEMENTS: 4}
STAGES = {"dense": 3, "dense loose": 3, "blocks": 2, "words": 2, ELEMENTS: 1}
# columns of a part of a split sum at least
SHORTEST = 256


def _dora_norm_kernel(
    w_ptr,
    codes_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    levels_ptr,
    levels8_ptr,
    a_ptr,
    b_ptr,
    part_ptr,
    N,
    K,
    R,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    k_per_split,
    scaling,
    block_shift,
    NESTED: tl.constexpr,
    PER_SCALE: tl.constexpr,
    SHUFFLED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rank = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    row_ok, rank_ok = row < N, rank < R
    squares = tl.zeros((BLOCK_N,), tl.float32)
    projected = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    first = split * k_per_split
    for k in range(first, tl.minimum(first + k_per_split, K), BLOCK_K):
        column = k + tl.arange(0, BLOCK_K)
        if PER_SCALE == 0:
            w = tl.load(
                w_ptr + row[:, None] * stride_wn + column.to(tl.int64)[None, :] * stride_wk,
                mask=row_ok[:, None] & (column < K)[None, :],
                other=0.0,
            )
        else:
            w = nf4_tile(
                codes_ptr,
                absmax_ptr,
                nested_absmax_ptr,
                nested_offset_ptr,
                levels_ptr,
                levels8_ptr,
                row,
                k,
                N,
                K,
                block_shift,
                NESTED,
                PER_SCALE,
                SHUFFLED,
                BLOCK_N,
                BLOCK_K,
            )
            # only its dtype matters: what the matrix product rounds W to
            w = round_to(w, w_ptr.dtype.element_ty)
        a = tl.load(
            a_ptr + rank[None, :] * stride_ar + column.to(tl.int64)[:, None] * stride_ak,
            mask=rank_ok[None, :] & (column < K)[:, None],
            other=0.0,
        )
        wide = widen(w)
        squares += tl.sum(wide * wide, axis=1)
        projected = dot(meet(w, a_ptr.dtype.element_ty), a, projected)
    b = tl.load(
        b_ptr + row[:, None] * stride_bn + rank[None, :] * stride_br,
        mask=row_ok[:, None] & rank_ok[None, :],
        other=0.0,
    )
    part = 2.0 * scaling * tl.sum(widen(b) * projected, axis=1)
    # every program of a row's ranks has the same squares
    part += tl.where(tl.program_id(1) == 0, squares, 0.0)
    place = (split * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * N + row
    tl.store(part_ptr + place, part, mask=row_ok)


_WIDE = form(
    _dora_norm_kernel,
    ("stride_wk", "stride_ak", "stride_br"),
    ("K", "stride_wn", "stride_ar", "k_per_split"),
    addresses=True,
)
_LOOSE = form(_dora_norm_kernel)
# by how W is read
_FORMS = {"dense": _WIDE, "dense loose": _LOOSE, "blocks": _WIDE, "words": _WIDE, ELEMENTS: _LOOSE}


def variants() -> Iterator[Variant]:
    """Every configuration the launch can choose."""
    kinds = (("dense", False), ("dense loose", False), *itertools.product(("blocks", "words", ELEMENTS), (False, True)))
    for (dtype, low), (kind, nested) in itertools.product(DTYPE_PAIRS, kinds):
        for block_r in BLOCK_R[low]:
            dense = kind.startswith("dense")
            block_n, block_k = _tile(kind, low)
            yield Variant(
                name=f"{TYPES[dtype]} {TYPES[low]} rank {block_r} {kind}{' nested' * nested}",
                form=_FORMS[kind],
                types={
                    "w_ptr": f"*{TYPES[dtype]}",
                    # a dense weight has no codes: itself is passed for them
                    **{n: f"*{TYPES[dtype]}" if dense else t for n, t in argument_types(kind, nested).items()},
                    **dict.fromkeys(("a_ptr", "b_ptr"), f"*{TYPES[low]}"),
                    "part_ptr": "*fp32",
                    "scaling": "fp32",
                },
                constants={
                    "NESTED": nested,
                    "PER_SCALE": PER_SCALE[kind],
                    "SHUFFLED": True,
                    "BLOCK_N": block_n,
                    "BLOCK_K": block_k,
                    "BLOCK_R": block_r,
                },
                options=_options(kind),
                tile_m=block_n if low != torch.float32 else 0,
            )


def _kind(like: Tensor, w: Packed | None, lora_a: Tensor, lora_b: Tensor) -> str:
    wide = in_wide_loads(lora_a) and lora_b.stride(1) == 1 and begins_aligned(lora_b)
    if w is None:
        return "dense" if wide and in_wide_loads(like) else "dense loose"
    return reading(w, SMALL_TILE[1]) if wide else ELEMENTS


def _tile(kind: str, low: torch.dtype) -> tuple[int, int]:
    return TILE[low] if kind == "dense" else SMALL_TILE


def _options(kind: str) -> dict[str, Any]:
    return {"num_warps": WARPS[kind], "num_stages": STAGES[kind], "enable_fp_fusion": False}


def _norms(
    like: Tensor, w: Packed | None, lora_a: Tensor, lora_b: Tensor, scaling: float, splits: int | None
) -> Tensor:
    """Norms of the rows of a dense weight, or of the packed one that is rounded to the dtype of `like`."""
    n, (r, k), low = lora_b.shape[0], lora_a.shape, lora_a.dtype
    kind = _kind(like, w, lora_a, lora_b)
    block_n, block_k = _tile(kind, low)
    block_r = least_that_holds(r, BLOCK_R[low])
    grid_n, grid_r = triton.cdiv(n, block_n), triton.cdiv(max(r, 1), block_r)
    splits = splits or splits_to_fill(like.device, grid_n * grid_r, k, SHORTEST)
    k_per_split = triton.cdiv(triton.cdiv(max(k, 1), splits), block_k) * block_k
    splits = triton.cdiv(max(k, 1), k_per_split)
    part = like.new_empty((splits * grid_r, n), dtype=torch.float32)
    log_launch("dora_norm" if w is None else "nf4_dora_norm", kind)
    if n:
        with torch.cuda.device_of(like):
            _FORMS[kind][(grid_n, grid_r, splits)](
                like,
                *((like,) * 6 if w is None else arguments(w, kind)),
                lora_a,
                lora_b,
                part,
                n,
                k,
                r,
                *(like.stride() if w is None else (0, 1)),
                *lora_a.stride(),
                *lora_b.stride(),
                k_per_split,
                float(scaling),
                0 if w is None else w.block_size.bit_length() - 1,
                NESTED=w is not None and w.nested_absmax is not None,
                PER_SCALE=PER_SCALE[kind],
                SHUFFLED=SHUFFLED,
                BLOCK_N=block_n,
                BLOCK_K=block_k,
                BLOCK_R=block_r,
                **_options(kind),
            )
    update = reference.update_squares(lora_a.float(), lora_b.float(), scaling)
    return launch_split_sum(part, torch.float32, add=update).clamp_(min=0).sqrt_()


@near
def launch_dora_norm(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, splits: int | None = None
) -> Tensor:
    """Run the kernel; operands as checked by the op, any strides.

    Args:
        splits: parts of the sum over columns; by default as many as fill the device.
    """
    if left_to_reference("dora_norm", lora_a, lora_b, weight):
        return reference.dora_norm(weight, lora_a, lora_b, scaling)
    return _norms(weight, None, lora_a, lora_b, scaling, splits)


@near
def launch_nf4_dora_norm(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    block_size: int,
    nested_block_size: int,
    dtype: torch.dtype,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    splits: int | None = None,
) -> Tensor:
    """Run the kernel on an NF4 weight; operands as checked by the op. Copies codes or scales that are not contiguous.

    Args:
        splits: parts of the sum over columns; by default as many as fill the device.
    """
    w = as_read(Packed(codes, absmax, nested_absmax, nested_offset, shape, block_size, nested_block_size))
    like = codes.new_empty(0, dtype=dtype)
    if left_to_reference("nf4_dora_norm", lora_a, lora_b, like):
        return reference.dora_norm(w.dense(dtype), lora_a, lora_b, scaling)
    return _norms(like, w, lora_a, lora_b, scaling, splits)


register(op, "cuda", launch_dora_norm)
register(nf4_op, "cuda", launch_nf4_dora_norm)
