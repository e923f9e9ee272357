"""Triton kernels for lora_core::grouped_lora and its backward: rows of one batch that belong to different adapters.

    S_m = x_m A_g^T,  dS_m = s_g G_m B_g               _gather_shrink_kernel
    y_m = base_m + s_g S_m B_g^T,  dx_m = dS_m A_g     _gather_expand_kernel
    dA_g = sum dS_m^T x_m,  dB_g = s_g sum G_m^T S_m   _gather_gradient_kernel

Rows are sorted by adapter on the device, and a tile holds rows of one adapter, so that work and traffic follow each
adapter's own rank and none waits for the host. Rows without an adapter form a group of rank 0. A gradient is summed by
one program in the order of the rows: no atomics, the same bits every time.

Reference: lora_core/reference/grouped.py
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.tile import dot, meet, round_to, widen
from lora_core.kernels.variant import DTYPE_PAIRS, TYPES, Variant
from lora_core.ops.grouped_lora import backward_op, op
from lora_core.reference import grouped as reference

# rows of a tile; columns of a step or a tile, and ranks of a program, by A's dtype; ranks of a step on the way up
BLOCK_M = 16
BLOCK_C = {torch.float32: 64, torch.float16: 128, torch.bfloat16: 128}
BLOCK_R = {torch.float32: (16,), torch.float16: (16, 64), torch.bfloat16: (16, 64)}
EXPAND_R = 16
WARPS = 4
STAGES = 2


class Groups(NamedTuple):
    """Which rows belong to which adapter, on the device.

    Args:
        order: int64 [M], the rows sorted by adapter.
        starts: int64 [G + 2], where each group begins in order; group G has no adapter.
        tile_ends: int64 [G + 1], how many tiles there are up to each group's end.
        tiles: at most this many tiles there are.
    """

    order: Tensor
    starts: Tensor
    tile_ends: Tensor
    tiles: int


def groups(adapter: Tensor, count: int) -> Groups:
    """Sort rows by adapter, of which there are `count`; nothing here waits for the device."""
    rows = len(adapter)
    key = torch.where((adapter < 0) | (adapter >= count), count, adapter)
    key, order = key.sort(stable=True)
    starts = torch.searchsorted(key, torch.arange(count + 2, device=adapter.device))
    tile_ends = ((starts.diff() + BLOCK_M - 1) // BLOCK_M).cumsum(0)
    return Groups(order, starts, tile_ends, min(rows, triton.cdiv(rows, BLOCK_M) + count + 1))


@functools.cache
def rank_offsets(ranks: tuple[int, ...], device: torch.device) -> Tensor:
    """Return int64 [G + 2]: where each adapter's ranks begin; group G has none."""
    found = reference.offsets(ranks)
    return torch.tensor([*found, found[-1]], dtype=torch.int64).to(device)


@functools.cache
def rank_chunks(ranks: tuple[int, ...], block_r: int, device: torch.device) -> Tensor:
    """Return int64 [chunks, 2]: adapter and first rank of every block of ranks."""
    found = [(g, first) for g, rank in enumerate(ranks) for first in range(0, rank, block_r)]
    return torch.tensor(found, dtype=torch.int64).reshape(-1, 2).to(device)


@triton.jit
def _tile(order_ptr, starts_ptr, tile_ends_ptr, offsets_ptr, G, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Group, rows, whether there are such, first rank in A and number of ranks of this program's tile."""
    tile = tl.program_id(0)
    each = tl.arange(0, GROUPS)
    # tiles behind the last belong to no group; their rows are masked
    ends = tl.load(tile_ends_ptr + each, mask=each <= G, other=0)
    group = tl.minimum(tl.sum(((ends <= tile) & (each <= G)).to(tl.int32)), G)
    before = tl.load(tile_ends_ptr + group - 1, mask=group > 0, other=0)
    first = tl.load(starts_ptr + group) + (tile - before) * BLOCK_M
    place = first + tl.arange(0, BLOCK_M)
    ok = place < tl.load(starts_ptr + group + 1)
    row = tl.load(order_ptr + place, mask=ok, other=0)
    offset = tl.load(offsets_ptr + group)
    return group, row, ok, offset, (tl.load(offsets_ptr + group + 1) - offset).to(tl.int32)


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
    group, row, row_ok, offset, ranks = _tile(order_ptr, starts_ptr, tile_ends_ptr, offsets_ptr, G, GROUPS, BLOCK_M)
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


@triton.jit(do_not_specialize=["G", "R"])
def _gather_expand_kernel(
    s_ptr,
    p_ptr,
    base_ptr,
    scaling_ptr,
    y_ptr,
    order_ptr,
    starts_ptr,
    tile_ends_ptr,
    offsets_ptr,
    G,
    C,
    R,
    stride_pr,
    stride_pc,
    stride_base_m,
    stride_base_c,
    SCALED: tl.constexpr,
    BASE: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y [M, C] = base + factor S P for rows of S [M, R] and each group's rows of P [., C]."""
    group, row, row_ok, offset, ranks = _tile(order_ptr, starts_ptr, tile_ends_ptr, offsets_ptr, G, GROUPS, BLOCK_M)
    column = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    column_ok = column < C
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    # few steps: loads in flight would cost registers
    for r in tl.range(0, ranks, BLOCK_R, num_stages=1):
        rank = r + tl.arange(0, BLOCK_R)
        rank_ok = rank < ranks
        s = tl.load(s_ptr + row[:, None] * R + rank[None, :], mask=row_ok[:, None] & rank_ok[None, :], other=0.0)
        p = tl.load(
            p_ptr + (offset + rank)[:, None] * stride_pr + column[None, :] * stride_pc,
            mask=rank_ok[:, None] & column_ok[None, :],
            other=0.0,
        )
        acc = dot(s, p, acc)
    if SCALED:
        acc *= tl.load(scaling_ptr + group, mask=group < G, other=0.0)
    ok = row_ok[:, None] & column_ok[None, :]
    if BASE:
        base = base_ptr + row[:, None] * stride_base_m + column[None, :] * stride_base_c
        acc += widen(tl.load(base, mask=ok, other=0.0))
    tl.store(y_ptr + row[:, None] * C + column[None, :], round_to(acc, y_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["R"])
def _gather_gradient_kernel(
    t_ptr,
    d_ptr,
    scaling_ptr,
    out_ptr,
    order_ptr,
    starts_ptr,
    offsets_ptr,
    chunks_ptr,
    C,
    R,
    stride_dm,
    stride_dc,
    stride_or,
    stride_oc,
    SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out [., C] = factor T^T D over each group's rows of T [M, R] and D [M, C]."""
    group = tl.load(chunks_ptr + tl.program_id(0) * 2)
    rank = tl.load(chunks_ptr + tl.program_id(0) * 2 + 1) + tl.arange(0, BLOCK_R)
    offset = tl.load(offsets_ptr + group)
    rank_ok = rank < tl.load(offsets_ptr + group + 1) - offset
    column = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    column_ok = column < C
    first, end = tl.load(starts_ptr + group).to(tl.int32), tl.load(starts_ptr + group + 1).to(tl.int32)
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for m in range(first, end, BLOCK_M):
        place = m + tl.arange(0, BLOCK_M)
        row_ok = place < end
        row = tl.load(order_ptr + place, mask=row_ok, other=0)
        t = tl.load(t_ptr + row[None, :] * R + rank[:, None], mask=rank_ok[:, None] & row_ok[None, :], other=0.0)
        d = tl.load(
            d_ptr + row[:, None] * stride_dm + column[None, :] * stride_dc,
            mask=row_ok[:, None] & column_ok[None, :],
            other=0.0,
        )
        acc = dot(t, meet(d, t_ptr.dtype.element_ty), acc)
    if SCALED:
        acc *= tl.load(scaling_ptr + group)
    tl.store(
        out_ptr + (offset + rank)[:, None] * stride_or + column[None, :] * stride_oc,
        round_to(acc, out_ptr.dtype.element_ty),
        mask=rank_ok[:, None] & column_ok[None, :],
    )


# adapters that a compiled kernel searches among, as variants() lists them: few, and many
SEARCHED = (8, 64)


def variants() -> Iterator[Variant]:
    """Every configuration the launch can choose but for the number of adapters, last dimensions contiguous."""
    for (dtype, low), searched in itertools.product(DTYPE_PAIRS, SEARCHED):
        for block_r in BLOCK_R[low]:
            shape = f"{TYPES[dtype]} {TYPES[low]} rank {block_r} of {searched}"
            tile = {"GROUPS": searched, "BLOCK_M": BLOCK_M, "BLOCK_C": BLOCK_C[low], "BLOCK_R": block_r}
            pointers = {
                **dict.fromkeys(("x_ptr", "base_ptr", "y_ptr", "d_ptr"), f"*{TYPES[dtype]}"),
                **dict.fromkeys(("p_ptr", "add_ptr", "s_ptr", "t_ptr", "out_ptr"), f"*{TYPES[low]}"),
                **dict.fromkeys(("order_ptr", "starts_ptr", "tile_ends_ptr", "offsets_ptr", "chunks_ptr"), "*i64"),
                "scaling_ptr": "*fp32",
            }
            # forward with A, backward with B^T: what is contiguous changes places
            for scaled, rows, columns in ((False, "stride_pr", "stride_pc"), (True, "stride_pc", "stride_pr")):
                for add in (False, True) if scaled else (False,):
                    name = f"shrink {shape}{' scaled' * scaled}{' added' * add}"
                    flags = {"SCALED": scaled, "ADD": add, "stride_xc": 1, columns: 1}
                    yield _variant(name, _gather_shrink_kernel, pointers, tile | flags, ("stride_xm", rows), low)
                # the way up has one size of rank step for all
                bases = () if block_r != EXPAND_R else (False, True) if scaled else (False,)
                for base in bases:
                    name = f"expand {shape}{' scaled' * scaled}{' base' * base}"
                    flags = {"SCALED": scaled, "BASE": base, "stride_base_c": 1, columns: 1}
                    yield _variant(name, _gather_expand_kernel, pointers, tile | flags, ("stride_base_m", rows), low)
            if searched == SEARCHED[0]:
                for scaled, rows, columns in ((False, "stride_or", "stride_oc"), (True, "stride_oc", "stride_or")):
                    name = f"gradient {shape}{' scaled' * scaled}"
                    flags = {"SCALED": scaled, "stride_dc": 1, columns: 1}
                    yield _variant(name, _gather_gradient_kernel, pointers, tile | flags, ("stride_dm", rows), low)


def _variant(
    name: str,
    kernel: object,
    pointers: Mapping[str, str],
    constants: Mapping[str, int],
    strides: tuple[str, ...],
    low: torch.dtype,
) -> Variant:
    arguments = kernel.arg_names  # type: ignore[attr-defined]
    numbers = dict.fromkeys(("G", "C", "R", *strides), "i32")
    return Variant(
        name=name,
        kernel=kernel,
        signature={a: t for a, t in {**pointers, **numbers}.items() if a in arguments},
        constants={a: v for a, v in constants.items() if a in arguments},
        aligned=tuple(a for a in (*strides, "C") if a in arguments),
        options={"num_warps": WARPS, "num_stages": STAGES},
        # a gradient's rows are ranks
        tile_m=0 if low == torch.float32 else BLOCK_M if "G" in arguments else constants["BLOCK_R"],
    )


def _block_r(ranks: Sequence[int], low: torch.dtype) -> int:
    return next((b for b in BLOCK_R[low] if max(ranks) <= b), BLOCK_R[low][-1])


def _shrink(
    x: Tensor, p: Tensor, found: Groups, ranks: Sequence[int], scaling: Tensor | None, add: Tensor | None = None
) -> Tensor:
    """S [M, max rank], 0 where an adapter has fewer ranks; p is A, or B^T."""
    count, widest, low = len(ranks), max(ranks, default=0), p.dtype
    s = x.new_zeros(len(x), widest, dtype=low)
    if s.numel():
        block_r = _block_r(ranks, low)
        with torch.cuda.device_of(x):
            _gather_shrink_kernel[(found.tiles, triton.cdiv(widest, block_r))](
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
                BLOCK_R=block_r,
                num_warps=WARPS,
                num_stages=STAGES,
            )
    return s


def _expand(
    s: Tensor,
    p: Tensor,
    found: Groups,
    ranks: Sequence[int],
    scaling: Tensor | None,
    base: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """y [M, C]; p is B^T, or A."""
    count, columns, low = len(ranks), p.shape[1], p.dtype
    y = s.new_empty(len(s), columns, dtype=dtype)
    if y.numel():
        with torch.cuda.device_of(s):
            _gather_expand_kernel[(found.tiles, triton.cdiv(columns, BLOCK_C[low]))](
                s,
                p,
                y if base is None else base,
                found.starts if scaling is None else scaling,
                y,
                *found[:3],
                rank_offsets(tuple(ranks), s.device),
                count,
                columns,
                s.shape[1],
                *p.stride(),
                *((0, 0) if base is None else base.stride()),
                SCALED=scaling is not None,
                BASE=base is not None,
                GROUPS=triton.next_power_of_2(count + 1),
                BLOCK_M=BLOCK_M,
                BLOCK_C=BLOCK_C[low],
                BLOCK_R=EXPAND_R,
                num_warps=WARPS,
                num_stages=STAGES,
            )
    return y


def _gradient(t: Tensor, d: Tensor, found: Groups, ranks: Sequence[int], scaling: Tensor | None, out: Tensor) -> None:
    """Fill out [sum of ranks, C], any strides."""
    if not out.numel():
        return
    low = t.dtype
    block_r = _block_r(ranks, low)
    chunks = rank_chunks(tuple(ranks), block_r, t.device)
    with torch.cuda.device_of(t):
        _gather_gradient_kernel[(len(chunks), triton.cdiv(d.shape[1], BLOCK_C[low]))](
            t,
            d,
            found.starts if scaling is None else scaling,
            out,
            found.order,
            found.starts,
            rank_offsets(tuple(ranks), t.device),
            chunks,
            d.shape[1],
            t.shape[1],
            *d.stride(),
            *out.stride(),
            SCALED=scaling is not None,
            BLOCK_M=BLOCK_M,
            BLOCK_C=BLOCK_C[low],
            BLOCK_R=block_r,
            num_warps=WARPS,
            num_stages=STAGES,
        )


def launch_grouped_lora(
    x: Tensor,
    base: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    ranks: Sequence[int],
    adapter: Tensor,
    scaling: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run the forward; operands and results as the op has them, any strides of x, base, lora_a and lora_b."""
    if x.dtype == torch.float64:
        return reference.forward(x, base, lora_a, lora_b, ranks, adapter, scaling)
    found = groups(adapter, len(ranks))
    hidden = _shrink(x, lora_a, found, ranks, None)
    return _expand(hidden, lora_b.T, found, ranks, scaling.contiguous(), base, x.dtype), hidden


def launch_grouped_lora_backward(
    d_y: Tensor,
    d_hidden: Tensor | None,
    x: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    ranks: Sequence[int],
    adapter: Tensor,
    scaling: Tensor,
    hidden: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward; operands and results as the op has them, empty where needs says that none is wanted."""
    need_x, need_a, need_b = needs
    none = d_y.new_empty(0)
    if d_y.dtype == torch.float64:
        wide = reference.backward(d_y, d_hidden, x, lora_a, lora_b, ranks, adapter, scaling, hidden, needs)
        d_x, d_lora_a, d_lora_b = (none if g is None else g for g in wide)
        return d_x, d_lora_a, d_lora_b
    found, scaling = groups(adapter, len(ranks)), scaling.contiguous()
    d_x = d_lora_a = d_lora_b = none
    if need_x or need_a:
        d_s = _shrink(d_y, lora_b.T, found, ranks, scaling, d_hidden)
        if need_x:
            d_x = _expand(d_s, lora_a, found, ranks, None, None, d_y.dtype)
        if need_a and x is not None:
            d_lora_a = lora_a.new_empty(lora_a.shape)
            _gradient(d_s, x, found, ranks, None, d_lora_a)
    if need_b:
        d_lora_b = lora_b.new_empty(lora_b.shape)
        _gradient(hidden, d_y, found, ranks, scaling, d_lora_b.T)
    return d_x, d_lora_a, d_lora_b


op.register_kernel("cuda")(launch_grouped_lora)
backward_op.register_kernel("cuda")(launch_grouped_lora_backward)
