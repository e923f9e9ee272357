"""Triton kernels for lora_core::swiglu and swiglu_backward: each one read of its operands and one write.

    y = g sigma(g) u
    dL/dg = d u sigma (1 + g (1 - sigma)),  dL/du = d g sigma        both from one read of d = dL/dy, g and u

Contiguous operands are one row. Else g and u are often the halves of one product: rows of adjacent elements that lie a
stride apart, which are read where they lie. Bound by memory: 6 and 10 bytes an element in half precision.

Reference: lora_core/reference/swiglu.py
"""

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.form import form, in_wide_loads
from lora_core.kernels.log import log_launch
from lora_core.kernels.reach import past_reach
from lora_core.kernels.tile import round_to, widen
from lora_core.kernels.variant import TYPES, Variant
from lora_core.ops.eager import register
from lora_core.ops.swiglu import backward_op, op
from lora_core.reference import swiglu as reference

# elements of a program: 8 a thread, so that loads and stores are 16 bytes wide in every dtype
ELEMENTS = 1024
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def _swiglu_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,
    columns: tl.int64,
    stride_gate: tl.int64,
    stride_up: tl.int64,
    per_row,
    ELEMENTS: tl.constexpr,
):
    row = (tl.program_id(0) // per_row).to(tl.int64)
    column = (tl.program_id(0) % per_row).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    ok = column < columns
    gate = widen(tl.load(gate_ptr + row * stride_gate + column, mask=ok, other=0.0))
    up = widen(tl.load(up_ptr + row * stride_up + column, mask=ok, other=0.0))
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * columns + column, round_to(y, y_ptr.dtype.element_ty), mask=ok)


def _swiglu_backward_kernel(
    d_y_ptr,
    gate_ptr,
    up_ptr,
    d_gate_ptr,
    d_up_ptr,
    columns: tl.int64,
    stride_d: tl.int64,
    stride_gate: tl.int64,
    stride_up: tl.int64,
    per_row,
    ELEMENTS: tl.constexpr,
):
    row = (tl.program_id(0) // per_row).to(tl.int64)
    column = (tl.program_id(0) % per_row).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    ok = column < columns
    d_y = widen(tl.load(d_y_ptr + row * stride_d + column, mask=ok, other=0.0))
    gate = widen(tl.load(gate_ptr + row * stride_gate + column, mask=ok, other=0.0))
    up = widen(tl.load(up_ptr + row * stride_up + column, mask=ok, other=0.0))
    sigma = tl.sigmoid(gate)
    d_gate = d_y * up * (sigma * (1.0 + gate * (1.0 - sigma)))
    d_up = d_y * (gate * sigma)
    tl.store(d_gate_ptr + row * columns + column, round_to(d_gate, d_gate_ptr.dtype.element_ty), mask=ok)
    tl.store(d_up_ptr + row * columns + column, round_to(d_up, d_up_ptr.dtype.element_ty), mask=ok)


# by whether all can be loaded 16 bytes at once
_FORWARD = {
    True: form(_swiglu_kernel, aligned=("columns", "stride_gate", "stride_up"), addresses=True),
    False: form(_swiglu_kernel),
}
_BACKWARD = {
    True: form(_swiglu_backward_kernel, aligned=("columns", "stride_d", "stride_gate", "stride_up"), addresses=True),
    False: form(_swiglu_backward_kernel),
}


def variants() -> Iterator[Variant]:
    """Every configuration the launch can choose."""
    directions = (("", _FORWARD), (" backward", _BACKWARD))
    for dtype, (direction, forms), wide in itertools.product(
        (torch.float32, torch.float16, torch.bfloat16), directions, (True, False)
    ):
        pointers = ("d_y_ptr", "gate_ptr", "up_ptr", "y_ptr", "d_gate_ptr", "d_up_ptr")
        yield Variant(
            name=f"{TYPES[dtype]}{direction}{'' if wide else ' odd'}",
            form=forms[wide],
            types={
                **dict.fromkeys(pointers, f"*{TYPES[dtype]}"),
                **dict.fromkeys(("columns", "stride_d", "stride_gate", "stride_up"), "i64"),
            },
            constants={"ELEMENTS": ELEMENTS},
            options=OPTIONS,
            weights=ELEMENTS,
        )


def _as_rows(*operands: Tensor) -> list[Tensor]:
    """Return operands of one shape as matrices whose rows are adjacent elements, copied where they are not.

    Rows of fewer elements than a program has are copied to one row: most of a program would have nothing to do.
    """
    columns = operands[0].shape[-1] if operands[0].dim() else 1
    if columns < ELEMENTS or all(t.is_contiguous() for t in operands):
        return [t.contiguous().view(1, -1) for t in operands]
    rows = (t.reshape(-1, columns) for t in operands)
    return [t if t.stride(1) == 1 else t.contiguous() for t in rows]


def _log(operation: str, operands: tuple[Tensor, ...], rows: list[Tensor]) -> None:
    copied = [t for t, row in zip(operands, rows, strict=True) if t.data_ptr() != row.data_ptr()]
    log_launch(operation, "one row" if len(rows[0]) == 1 else "rows", *copied)


def launch_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Run the kernel; operands as checked by the op. Copies what has no rows of adjacent elements."""
    if past_reach("swiglu", gate):
        return reference.swiglu(gate, up)
    y = gate.new_empty(gate.shape)
    if y.numel() == 0:
        return y
    rows = _as_rows(gate, up)
    _log("swiglu", (gate, up), rows)
    m, columns = rows[0].shape
    per_row = triton.cdiv(columns, ELEMENTS)
    with torch.cuda.device_of(gate):
        _FORWARD[all(map(in_wide_loads, rows))][(m * per_row,)](
            *rows, y, columns, *(t.stride(0) for t in rows), per_row, ELEMENTS=ELEMENTS, **OPTIONS
        )
    return y


def launch_swiglu_backward(d_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Run the kernel; operands as checked by the op. Copies what has no rows of adjacent elements."""
    if past_reach("swiglu_backward", gate):
        return reference.backward(d_y, gate, up)
    d_gate, d_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    if d_gate.numel() == 0:
        return d_gate, d_up
    rows = _as_rows(d_y, gate, up)
    _log("swiglu_backward", (d_y, gate, up), rows)
    m, columns = rows[0].shape
    per_row = triton.cdiv(columns, ELEMENTS)
    with torch.cuda.device_of(gate):
        _BACKWARD[all(map(in_wide_loads, rows))][(m * per_row,)](
            *rows, d_gate, d_up, columns, *(t.stride(0) for t in rows), per_row, ELEMENTS=ELEMENTS, **OPTIONS
        )
    return d_gate, d_up


register(op, "cuda", launch_swiglu)
register(backward_op, "cuda", launch_swiglu_backward)
