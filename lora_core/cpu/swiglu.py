"""lora_core::swiglu on the CPU, by compiled loops where Numba is installed."""

import torch
from torch import Tensor

from lora_core.cpu.chunks import SHARED, share
from lora_core.cpu.rows import array, loops_for
from lora_core.ops.eager import register
from lora_core.ops.swiglu import backward_op, op
from lora_core.reference import swiglu as reference


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return what the reference returns, up to rounding."""
    loops = loops_for("swiglu", gate)
    if loops is None:
        return reference.swiglu(gate, up)
    y = torch.empty(gate.shape, dtype=gate.dtype)
    share(loops.forward, y.numel(), SHARED, SHARED, *(array(t.contiguous()).ravel() for t in (gate, up, y)))
    return y


def swiglu_backward(d_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the reference returns, up to rounding."""
    loops = loops_for("swiglu", gate)
    if loops is None:
        return reference.backward(d_y, gate, up)
    d_gate, d_up = (torch.empty(gate.shape, dtype=gate.dtype) for _ in range(2))
    flat = (array(t.contiguous()).ravel() for t in (d_y, gate, up, d_gate, d_up))
    share(loops.backward, gate.numel(), SHARED, SHARED, *flat)
    return d_gate, d_up


register(op, "cpu", swiglu)
register(backward_op, "cpu", swiglu_backward)
