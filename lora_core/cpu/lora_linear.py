"""lora_core::lora_linear on the CPU: the reference's formulas with the faster library's products."""

from collections.abc import Sequence

from torch import Tensor

from lora_core.cpu.dropout import dropped, one_mask_each
from lora_core.cpu.low_rank import a_gradient, add_low_rank, b_gradient, expand, hidden_gradient, runs_here, shrink
from lora_core.cpu.product import product
from lora_core.ops.eager import register
from lora_core.ops.lora_linear import backward_op, op
from lora_core.reference import lora as reference


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return what the reference returns, up to rounding."""
    flat = x.reshape(-1, weight.shape[1])
    if runs_here(x, lora_a):
        hidden = shrink(flat, lora_a, dropout, seed)
        y = expand(flat, weight, bias, hidden, lora_b, scaling)
    else:
        y, hidden = reference.forward(flat, weight, bias, lora_a, lora_b, scaling, dropout, seed, dropped)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0]), hidden


def lora_linear_backward(
    d_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    hidden: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return what the reference returns, up to rounding."""
    columns, rows = weight.shape
    flat, grad = None if x is None else x.reshape(-1, rows), d_y.reshape(-1, columns)
    d_x, *others = gradients(grad, flat, weight, lora_a, lora_b, hidden, scaling, dropout, seed, needs)
    d_weight, d_bias, d_lora_a, d_lora_b = others
    return None if d_x is None else d_x.view(*d_y.shape[:-1], rows), d_weight, d_bias, d_lora_a, d_lora_b


def gradients(
    d_y: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    hidden: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients (d_x, d_weight, d_bias, d_lora_a, d_lora_b); arguments as in reference.lora.backward."""
    drop = one_mask_each()
    if not runs_here(d_y, lora_a):
        return reference.backward(d_y, x, weight, lora_a, lora_b, hidden, scaling, dropout, seed, needs, drop)
    need_x, need_weight, need_bias, need_a, need_b = needs
    d_x = d_lora_a = None
    if need_x or need_a:
        d_s = hidden_gradient(d_y, lora_b, scaling)
        if need_a and x is not None:
            d_lora_a = a_gradient(d_s, x, dropout, seed, drop)
        if need_x and weight is not None:
            d_x = add_low_rank(product(d_y, weight.T), d_s, lora_a, dropout, seed, drop)
    d_lora_b = b_gradient(d_y, hidden, scaling) if need_b else None
    d_weight = product(d_y.T, x.T) if need_weight and x is not None else None
    return d_x, d_weight, d_y.sum(0) if need_bias else None, d_lora_a, d_lora_b


register(op, "cpu", lora_linear)
register(backward_op, "cpu", lora_linear_backward)
