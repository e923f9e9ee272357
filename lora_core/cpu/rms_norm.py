"""lora_core::rms_norm on the CPU, by compiled loops where Numba is installed."""

import numpy as np
import torch
from torch import Tensor

from lora_core.cpu.chunks import SHARED, share
from lora_core.cpu.rows import array, loops_for
from lora_core.ops.eager import register
from lora_core.ops.rms_norm import backward_op, op
from lora_core.reference import rms_norm as reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return what the reference returns, up to rounding."""
    loops = loops_for("rms_norm", x)
    if loops is None:
        return reference.forward(x, weight, eps)
    columns = len(weight)
    y, r = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.numel() // columns, dtype=torch.float32)
    rows, out = (array(t.contiguous()).reshape(-1, columns) for t in (x, y))
    chunk = max(SHARED // columns, 1)
    share(loops.forward, len(rows), chunk, chunk, rows, array(weight.contiguous()), np.float32(eps), out, r.numpy())
    return y, r


def rms_norm_backward(
    d_y: Tensor, x: Tensor, weight: Tensor, r: Tensor, need_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Return what the reference returns, up to rounding."""
    loops = loops_for("rms_norm", x)
    if loops is None:
        return reference.backward(d_y, x, weight, r, need_weight)
    columns = len(weight)
    d_x = torch.empty(x.shape, dtype=x.dtype)
    grads, rows, out = (array(t.contiguous()).reshape(-1, columns) for t in (d_y, x, d_x))
    chunk = max(SHARED // columns, 1)
    parts = torch.zeros(-(-len(rows) // chunk) if need_weight else 0, columns, dtype=torch.float32)
    of_rows = array(weight.contiguous()), r.contiguous().numpy(), out, parts.numpy(), chunk
    share(loops.backward, len(rows), chunk, chunk, grads, rows, *of_rows)
    return d_x, parts.sum(0).to(weight.dtype) if need_weight else None


register(op, "cpu", rms_norm)
register(backward_op, "cpu", rms_norm_backward)
