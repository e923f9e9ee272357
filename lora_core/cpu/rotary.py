"""lora_core::rotary on the CPU, by compiled loops where Numba is installed."""

from collections.abc import Callable

import torch
from torch import Tensor

from lora_core.cpu.chunks import SHARED, share
from lora_core.cpu.rows import array, loops_for
from lora_core.ops.eager import register
from lora_core.ops.rotary import backward_op, op
from lora_core.reference import rotary as reference


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return what the reference returns, up to rounding."""
    loops = loops_for("rotary", x)
    if loops is None:
        return reference.rotary(x, cos, sin)
    y = torch.empty(x.shape, dtype=x.dtype)
    _share(loops.forward, x, cos, sin, y)
    return y


def rotary_backward(d_y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return what the reference returns, up to rounding."""
    loops = loops_for("rotary", d_y)
    if loops is None:
        return reference.backward(d_y, cos, sin)
    b, h, t, d = d_y.shape
    d_x = torch.empty(b, t, h, d, dtype=d_y.dtype)
    _share(loops.backward, d_y, cos, sin, d_x)
    return d_x.transpose(1, 2)


def _share(loop: Callable[..., None], given: Tensor, cos: Tensor, sin: Tensor, made: Tensor) -> None:
    b, h, t, d = given.shape
    chunk = max(SHARED // (h * d), 1)
    # as the heads of projections and the gradients of attention lie: token by token
    by_token = given.transpose(1, 2).contiguous()
    share(loop, b * t, chunk, chunk, *map(array, (by_token, cos.contiguous(), sin.contiguous(), made)))


register(op, "cpu", rotary)
register(backward_op, "cpu", rotary_backward)
