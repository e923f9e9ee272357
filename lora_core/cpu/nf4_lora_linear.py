"""lora_core::nf4_lora_linear on the CPU.

Few rows of x, and of dL/dy, are multiplied by compiled loops that decode the weight as they go; for more of them the
weight is dequantised for the call, then as a dense layer.
"""

from collections.abc import Sequence

from torch import Tensor

from lora_core.cpu.dropout import dropped
from lora_core.cpu.few_rows import few_rows, few_rows_back
from lora_core.cpu.lora_linear import gradients, lora_linear
from lora_core.cpu.low_rank import add_low_rank, hidden_gradient
from lora_core.ops.eager import register
from lora_core.ops.nf4_lora_linear import backward_op, op
from lora_core.ops.packed import Packed
from lora_core.reference import lora as reference


def nf4_lora_linear(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    block_size: int,
    nested_block_size: int,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return what the reference returns, up to rounding."""
    w = Packed(codes, absmax, nested_absmax, nested_offset, shape, block_size, nested_block_size)
    flat = x.reshape(-1, shape[1])
    y = few_rows(flat, w)
    if y is None:
        return lora_linear(x, w.dense(x.dtype), bias, lora_a, lora_b, scaling, dropout, seed)
    hidden = reference.shrink(flat, lora_a, dropout, seed, dropped)
    y = y if bias is None else y.add_(bias)
    y.addmm_(hidden.float(), lora_b.T.float(), alpha=scaling)
    y = y.to(x.dtype)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], shape[0]), hidden


def nf4_lora_linear_backward(
    d_y: Tensor,
    x: Tensor | None,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    block_size: int,
    nested_block_size: int,
    lora_a: Tensor,
    lora_b: Tensor,
    hidden: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return what the reference returns, up to rounding."""
    need_x, need_bias, need_a, need_b = needs
    columns, rows = shape
    w = Packed(codes, absmax, nested_absmax, nested_offset, shape, block_size, nested_block_size)
    flat, grad = None if x is None else x.reshape(-1, rows), d_y.reshape(-1, columns)
    base = few_rows_back(grad, w) if need_x else None
    weight = w.dense(d_y.dtype) if need_x and base is None else None
    wanted = (weight is not None, False, need_bias, need_a, need_b)
    d_x, _, d_bias, d_lora_a, d_lora_b = gradients(
        grad, flat, weight, lora_a, lora_b, hidden, scaling, dropout, seed, wanted
    )
    if base is not None:
        d_s = hidden_gradient(grad.to(lora_b.dtype), lora_b, scaling)
        d_x = add_low_rank(base, d_s.float(), lora_a.float(), dropout, seed).to(d_y.dtype)
    return None if d_x is None else d_x.view(*d_y.shape[:-1], rows), d_bias, d_lora_a, d_lora_b


register(op, "cpu", nf4_lora_linear)
register(backward_op, "cpu", nf4_lora_linear_backward)
