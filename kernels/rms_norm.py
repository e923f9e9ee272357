"""Triton kernels for lora_core::rms_norm and rms_norm_backward, from one read of their operands.

With n = x r, g = dL/dy and h = g w, and without the third power of r, which may be past float32's range:

    y = n w
    dL/dx = r (h - n <h, n> / K)
    dL/dw = sum over rows of g n

A program has a few rows, whole ones up to the largest of TILES. Of longer ones the forward reads blocks of columns
twice, for the sum and for the result; in the backward a program has one block and reads all for the sum. Where dL/dw is
asked for, a program goes over a range of rows, and the parts of its sum are added in a fixed order (split_sum.py), two
times where they are many: no atomics, the same bits every time. Bound by memory.

Reference: lora_core/reference/rms_norm.py
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.form import begins_aligned, form, in_wide_loads
from lora_core.kernels.log import log_launch
from lora_core.kernels.processors import splits_to_fill
from lora_core.kernels.reach import near, past_reach
from lora_core.kernels.split_sum import launch_split_sum
from lora_core.kernels.tile import round_to, widen
from lora_core.kernels.variant import TYPES, Variant, least_that_holds
from lora_core.ops.eager import register
from lora_core.ops.rms_norm import backward_op, op
from lora_core.reference import rms_norm as reference

# by whether all is loaded 16 bytes at once, and the columns of a program, its rows and warps: 8 to 32 elements a
# thread; 8 where they are loaded one by one, whose addresses take the registers
TILES = {
    True: {128: (16, 8), 512: (4, 4), 2048: (1, 4), 4096: (1, 8), 8192: (1, 8)},
    False: {128: (8, 4), 1024: (1, 4)},
}
# programs of a multiprocessor that sum over rows, and parts that are added at once
PER_PROCESSOR, PARTS = 2, 16


def _rms_norm_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    r_ptr,
    M,
    K,
    stride_xm,
    stride_xk,
    eps,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = (row < M)[:, None]
    squares = tl.zeros((BLOCK_M,), tl.float32)
    x_row, y_row = x_ptr + row[:, None] * stride_xm, y_ptr + row[:, None] * K
    column = tl.arange(0, BLOCK_K).to(tl.int64)[None, :]
    if WHOLE:
        x = widen(tl.load(x_row + column * stride_xk, mask=row_ok & (column < K), other=0.0))
        squares += tl.sum(x * x, axis=1)
    else:
        for first in tl.range(0, K, BLOCK_K, num_stages=1):
            place = first + column
            x = widen(tl.load(x_row + place * stride_xk, mask=row_ok & (place < K), other=0.0))
            squares += tl.sum(x * x, axis=1)
    r = tl.rsqrt(squares / K + eps)
    tl.store(r_ptr + row, r, mask=row < M)
    if WHOLE:
        w = widen(tl.load(weight_ptr + column, mask=column < K, other=0.0))
        y = round_to(x * r[:, None] * w, y_ptr.dtype.element_ty)
        tl.store(y_row + column, y, mask=row_ok & (column < K))
    else:
        for first in tl.range(0, K, BLOCK_K, num_stages=1):
            place = first + column
            x = widen(tl.load(x_row + place * stride_xk, mask=row_ok & (place < K), other=0.0))
            w = widen(tl.load(weight_ptr + place, mask=place < K, other=0.0))
            y = round_to(x * r[:, None] * w, y_ptr.dtype.element_ty)
            tl.store(y_row + place, y, mask=row_ok & (place < K))


def _rms_norm_backward_kernel(
    d_y_ptr,
    x_ptr,
    weight_ptr,
    r_ptr,
    d_x_ptr,
    part_ptr,
    M,
    K,
    stride_dm,
    stride_dk,
    stride_xm,
    stride_xk,
    rows_per_split,
    WEIGHT: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # programs of the same rows come one after the other
    blocks = tl.cdiv(K, BLOCK_K)
    split = tl.program_id(0) // blocks
    each = tl.arange(0, BLOCK_K).to(tl.int64)[None, :]
    column = (tl.program_id(0) % blocks) * BLOCK_K + each
    column_ok = column < K
    w = widen(tl.load(weight_ptr + column, mask=column_ok, other=0.0))
    d_weight = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    start = split * rows_per_split
    for m in tl.range(start, tl.minimum(start + rows_per_split, M), BLOCK_M, num_stages=1):
        row = (m + tl.arange(0, BLOCK_M)).to(tl.int64)
        row_ok = (row < M)[:, None]
        ok = row_ok & column_ok
        d_row, x_row = d_y_ptr + row[:, None] * stride_dm, x_ptr + row[:, None] * stride_xm
        r = tl.load(r_ptr + row, mask=row < M, other=0.0)[:, None]
        if not WHOLE:
            product = tl.zeros((BLOCK_M,), tl.float32)
            for first in tl.range(0, K, BLOCK_K, num_stages=1):
                place = first + each
                other_ok = row_ok & (place < K)
                other_g = widen(tl.load(d_row + place * stride_dk, mask=other_ok, other=0.0))
                other_n = widen(tl.load(x_row + place * stride_xk, mask=other_ok, other=0.0)) * r
                other_w = widen(tl.load(weight_ptr + place, mask=place < K, other=0.0))
                product += tl.sum(other_g * other_w * other_n, axis=1)
        g = widen(tl.load(d_row + column * stride_dk, mask=ok, other=0.0))
        n = widen(tl.load(x_row + column * stride_xk, mask=ok, other=0.0)) * r
        h = g * w
        if WHOLE:
            product = tl.sum(h * n, axis=1)
        d_x = r * (h - n * (product / K)[:, None])
        tl.store(d_x_ptr + row[:, None] * K + column, round_to(d_x, d_x_ptr.dtype.element_ty), mask=ok)
        if WEIGHT:
            d_weight += g * n
    if WEIGHT:
        total = tl.sum(d_weight, axis=0)[None, :]
        tl.store(part_ptr + split.to(tl.int64) * K + column, total, mask=column_ok)


# by whether all can be loaded 16 bytes at once
_FORWARD = {
    True: form(_rms_norm_kernel, ("stride_xk",), ("K", "stride_xm"), addresses=True),
    False: form(_rms_norm_kernel),
}
_BACKWARD = {
    True: form(_rms_norm_backward_kernel, ("stride_dk", "stride_xk"), ("K", "stride_dm", "stride_xm"), addresses=True),
    False: form(_rms_norm_backward_kernel),
}


class Tile(NamedTuple):
    """What a program has: rows, columns, whether these are all there are, and warps."""

    rows: int
    columns: int
    whole: bool
    warps: int

    @classmethod
    def of(cls, k: int, wide: bool) -> "Tile":
        """Return that of rows of k elements, loaded 16 bytes at once or one by one."""
        columns = least_that_holds(k, tuple(TILES[wide]))
        rows, warps = TILES[wide][columns]
        return cls(rows, columns, k <= columns, warps)

    @property
    def constants(self) -> dict[str, int]:
        """Those of a kernel."""
        return {"WHOLE": self.whole, "BLOCK_M": self.rows, "BLOCK_K": self.columns}

    @property
    def options(self) -> dict[str, int]:
        """Those of a launch."""
        return {"num_warps": self.warps, "enable_fp_fusion": True}


def variants() -> Iterator[Variant]:
    """Every configuration the launch can choose."""
    tiles = [(wide, Tile.of(k, wide)) for wide, known in TILES.items() for k in (*known, max(known) + 1)]
    for dtype, (wide, tile) in itertools.product((torch.float32, torch.float16, torch.bfloat16), tiles):
        kind = f"{tile.columns}{'' if tile.whole else ' of more'}"
        pointers = ("d_y_ptr", "x_ptr", "weight_ptr", "y_ptr", "d_x_ptr")
        types = {
            **dict.fromkeys(pointers, f"*{TYPES[dtype]}"),
            **dict.fromkeys(("r_ptr", "part_ptr"), "*fp32"),
            "eps": "fp32",
        }
        loose = "" if wide else " loose"
        yield Variant(f"{TYPES[dtype]} {kind}{loose}", _FORWARD[wide], types, tile.constants, tile.options)
        for weight in (False, True):
            yield Variant(
                name=f"{TYPES[dtype]} {kind} backward{' weight' * weight}{loose}",
                form=_BACKWARD[wide],
                types=types,
                constants={"WEIGHT": weight, **tile.constants},
                options=tile.options,
            )


def _step(rows: Tensor) -> int:
    """Return the stride between rows, 0 where there is one row."""
    return rows.stride(0) if len(rows) > 1 else 0


def _log(operation: str, wide: bool, operands: tuple[Tensor, ...], rows: tuple[Tensor, ...]) -> None:
    copied = [t for t, row in zip(operands, rows, strict=True) if t.data_ptr() != row.data_ptr()]
    log_launch(operation, "wide" if wide else "loose", *copied)


@near
def launch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Run the kernel; operands as checked by the op, any strides.

    Copies x where its rows lie in no one distance, and a weight that is not contiguous.
    """
    k = x.shape[-1]
    rows, w = x.reshape(-1, k), weight.contiguous()
    m = len(rows)
    if past_reach("rms_norm", x, m, k):
        return reference.forward(x, weight, eps)
    y, r = x.new_empty(x.shape), x.new_empty(m, dtype=torch.float32)
    wide = in_wide_loads(rows) and begins_aligned(w)
    tile = Tile.of(k, wide)
    _log("rms_norm", wide, (x, weight), (rows, w))
    if m:
        with torch.cuda.device_of(x):
            _FORWARD[wide][(triton.cdiv(m, tile.rows),)](
                rows,
                w,
                y,
                r,
                m,
                k,
                _step(rows),
                rows.stride(1),
                float(eps),
                **tile.constants,
                **tile.options,
            )
    return y, r


@near
def launch_rms_norm_backward(
    d_y: Tensor, x: Tensor, weight: Tensor, r: Tensor, need_weight: bool, splits: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Run the kernel; operands as checked by the op, any strides. Copies what launch_rms_norm copies, d_y as x.

    Args:
        splits: parts of the sum over rows; by default as many as fill the device.
    """
    k = x.shape[-1]
    rows, w, r = (d_y.reshape(-1, k), x.reshape(-1, k)), weight.contiguous(), r.contiguous()
    wide = all(map(in_wide_loads, rows)) and begins_aligned(w, r)
    m, tile = r.numel(), Tile.of(k, wide)
    blocks = triton.cdiv(k, tile.columns)
    if past_reach("rms_norm_backward", x, m * blocks, k):
        return reference.backward(d_y, x, weight, r, need_weight)
    rows_per_split, splits = _ranges(x.device, m, tile, blocks, splits) if need_weight else (tile.rows, 0)
    splits = splits or triton.cdiv(m, tile.rows)
    d_x = x.new_empty(x.shape)
    part = x.new_empty((splits, k), dtype=torch.float32) if need_weight else None
    _log("rms_norm_backward", wide, (d_y, x, weight), (*rows, w))
    if splits:
        with torch.cuda.device_of(x):
            _BACKWARD[wide][(splits * blocks,)](
                *rows,
                w,
                r,
                d_x,
                r if part is None else part,
                m,
                k,
                *(stride for t in rows for stride in (_step(t), t.stride(1))),
                rows_per_split,
                WEIGHT=need_weight,
                **tile.constants,
                **tile.options,
            )
    return d_x, None if part is None else _added(part, weight.dtype)


def _ranges(device: torch.device, m: int, tile: Tile, blocks: int, splits: int | None) -> tuple[int, int]:
    """Return the rows of each part of a sum over m rows, and how many parts there are: one at least."""
    splits = splits or PER_PROCESSOR * splits_to_fill(device, blocks, m, PER_PROCESSOR * tile.rows)
    rows = triton.cdiv(triton.cdiv(max(m, 1), splits), tile.rows) * tile.rows
    splits = triton.cdiv(max(m, 1), rows)
    # those past the end are zero
    return rows, splits if splits <= PARTS else triton.cdiv(splits, PARTS) * PARTS


def _added(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum of parts [P, K]; of many, PARTS are added first, for all of which there are programs."""
    if len(part) > PARTS:
        part = launch_split_sum(part.view(PARTS, -1, part.shape[1]), torch.float32)
    return launch_split_sum(part, dtype)


register(op, "cuda", launch_rms_norm)
register(backward_op, "cuda", launch_rms_norm_backward)
