"""Triton kernels for lora_core::rotary and rotary_backward, which are one: the transposed map is one of the same form.

    y1 = x1 c1 - x2 a,  y2 = x2 c2 + x1 b        forward  a = s1,  b = s2
                                                 backward a = -s2, b = -s1

A program rotates BLOCK_H heads of one token, by cosines and sines that it reads once. x may lie in any way, and mostly
does token by token; the gradient does always, and y head by head. Bound by memory: reads x and writes y once.

Reference: lora_core/reference/rotary.py
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.form import ALIGNMENT, begins_aligned, form
from lora_core.kernels.log import log_launch
from lora_core.kernels.reach import near, past_reach
from lora_core.kernels.tile import round_to, widen
from lora_core.kernels.variant import TYPES, Variant, least_that_holds
from lora_core.ops.eager import register
from lora_core.ops.rotary import backward_op, op
from lora_core.reference import rotary as reference

# heads of a program, and elements of half a head in a step: 8 pairs a thread, whose halves are loaded 16 bytes at once
BLOCK_H = 8
BLOCK_D = (32, 64, 128)


def _rotary_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    H,
    T,
    HALF,
    stride_xb,
    stride_xh,
    stride_xt,
    stride_xd,
    stride_cb,
    stride_ct,
    stride_cd,
    stride_sb,
    stride_st,
    stride_sd,
    stride_yb,
    stride_yh,
    stride_yt,
    BACKWARD: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # programs of one token come one after the other
    blocks = tl.cdiv(H, BLOCK_H)
    token = tl.program_id(0) // blocks
    head = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    b, t = (token // T).to(tl.int64), (token % T).to(tl.int64)
    x = x_ptr + b * stride_xb + t * stride_xt + head[:, None] * stride_xh
    cos, sin = cos_ptr + b * stride_cb + t * stride_ct, sin_ptr + b * stride_sb + t * stride_st
    y = y_ptr + b * stride_yb + t * stride_yt + head[:, None] * stride_yh
    for first in tl.range(0, HALF, BLOCK_D, num_stages=1):
        element = (first + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
        ok = element < HALF
        both_ok = (head < H)[:, None] & ok
        x1 = widen(tl.load(x + element * stride_xd, mask=both_ok, other=0.0))
        x2 = widen(tl.load(x + (element + HALF) * stride_xd, mask=both_ok, other=0.0))
        c1 = widen(tl.load(cos + element * stride_cd, mask=ok, other=0.0))
        c2 = widen(tl.load(cos + (element + HALF) * stride_cd, mask=ok, other=0.0))
        s1 = widen(tl.load(sin + element * stride_sd, mask=ok, other=0.0))
        s2 = widen(tl.load(sin + (element + HALF) * stride_sd, mask=ok, other=0.0))
        if BACKWARD:
            y1, y2 = x1 * c1 + x2 * s2, x2 * c2 - x1 * s1
        else:
            y1, y2 = x1 * c1 - x2 * s1, x2 * c2 + x1 * s2
        tl.store(y + element, round_to(y1, y_ptr.dtype.element_ty), mask=both_ok)
        tl.store(y + element + HALF, round_to(y2, y_ptr.dtype.element_ty), mask=both_ok)


_ROWS = tuple(f"stride_{rows}" for rows in ("xb", "xh", "xt", "cb", "ct", "sb", "st", "yb", "yh", "yt"))
# by whether all can be loaded 16 bytes at once
_FORMS = {
    True: form(_rotary_kernel, ("stride_xd", "stride_cd", "stride_sd"), ("HALF", *_ROWS), addresses=True),
    False: form(_rotary_kernel),
}


def variants() -> Iterator[Variant]:
    """Every configuration the launch can choose."""
    dtypes, directions = (torch.float32, torch.float16, torch.bfloat16), (("", False), (" backward", True))
    for dtype, block_d, (direction, backward), wide in itertools.product(dtypes, BLOCK_D, directions, (True, False)):
        yield Variant(
            name=f"{TYPES[dtype]} {block_d}{direction}{'' if wide else ' loose'}",
            form=_FORMS[wide],
            types=dict.fromkeys(("x_ptr", "cos_ptr", "sin_ptr", "y_ptr"), f"*{TYPES[dtype]}"),
            constants={"BACKWARD": backward, "BLOCK_H": BLOCK_H, "BLOCK_D": block_d},
            options=_options(block_d),
        )


def _options(block_d: int) -> dict[str, Any]:
    return {"num_warps": block_d // 32, "enable_fp_fusion": True}


def _steps(t: Tensor) -> tuple[int, ...]:
    """Return the strides of a tensor, 0 in the place of one that leads nowhere, as over a batch of one for all."""
    return tuple(step if size > 1 else 0 for size, step in zip(t.shape[:-1], t.stride(), strict=False))


def _is_wide(*operands: Tensor) -> bool:
    rows = all(t.stride(-1) == 1 and not any(step % ALIGNMENT for step in _steps(t)) for t in operands)
    return rows and begins_aligned(*operands) and operands[0].shape[-1] // 2 % ALIGNMENT == 0


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    """Return x [B, H, T, D] rotated forward, or as its gradient is."""
    b, h, t, d = x.shape
    operation = "rotary_backward" if backward else "rotary"
    programs = b * t * triton.cdiv(h, BLOCK_H)
    if past_reach(operation, x, programs, h, d):
        return reference.backward(x, cos, sin) if backward else reference.rotary(x, cos, sin)
    y = x.new_empty((b, t, h, d)).transpose(1, 2) if backward else x.new_empty(x.shape)
    wide, block_d = _is_wide(x, cos, sin), least_that_holds(d // 2, BLOCK_D)
    log_launch(operation, "wide" if wide else "loose")
    if y.numel():
        with torch.cuda.device_of(x):
            _FORMS[wide][(programs,)](
                x,
                cos,
                sin,
                y,
                h,
                t,
                d // 2,
                *(stride for operand in (x, cos, sin) for stride in (*_steps(operand), operand.stride(-1))),
                *_steps(y),
                BACKWARD=backward,
                BLOCK_H=BLOCK_H,
                BLOCK_D=block_d,
                **_options(block_d),
            )
    return y


@near
def launch_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Run the kernel; operands as checked by the op, any strides."""
    return _rotated(x, cos, sin, backward=False)


@near
def launch_rotary_backward(d_y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Run the kernel; operands as checked by the op, any strides."""
    return _rotated(d_y, cos, sin, backward=True)


register(op, "cuda", launch_rotary)
register(backward_op, "cuda", launch_rotary_backward)
