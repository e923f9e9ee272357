"""The operations lora_core::lora_linear and lora_core::lora_linear_backward.

The mathematics stands in lora_core/reference/lora.py.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_core.errors import DtypeError
from lora_core.ops.checks import is_transformed, outside_autocast
from lora_core.ops.eager import differentiable, gradients, hidden_of, none_to_empty
from lora_core.ops.layer import Layer, by_formula, prepared
from lora_core.ops.packed import Packed
from lora_core.ops.ready import ready
from lora_core.reference import lora as reference


@torch.library.custom_op("lora_core::lora_linear", mutates_args=())
def op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    flat = x.reshape(-1, weight.shape[1])
    y, hidden = reference.forward(flat, weight, bias, lora_a, lora_b, scaling, dropout, seed)
    return y.view(*x.shape[:-1], weight.shape[0]), hidden


@op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    return y, lora_a.new_empty(math.prod(x.shape[:-1]), lora_a.shape[0])


@torch.library.custom_op("lora_core::lora_linear_backward", mutates_args=())
def backward_op(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    columns, rows = weight.shape
    flat = None if x is None else x.reshape(-1, rows)
    d_x, *others = reference.backward(
        d_y.reshape(-1, columns), flat, weight, lora_a, lora_b, hidden, scaling, dropout, seed, needs
    )
    grads: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    grads = none_to_empty(d_y, (None if d_x is None else d_x.view(*d_y.shape[:-1], rows), *others))
    return grads


@backward_op.register_fake
def _(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    columns, rows = weight.shape
    like_x, like_bias = d_y.new_empty(*d_y.shape[:-1], rows), d_y.new_empty(columns)
    d_x, d_weight, d_bias, d_lora_a, d_lora_b = (
        t.new_empty(t.shape) if need else d_y.new_empty(0)
        for t, need in zip((like_x, weight, like_bias, lora_a, lora_b), needs, strict=True)
    )
    return d_x, d_weight, d_bias, d_lora_a, d_lora_b


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, _, lora_a, lora_b, ctx.scaling, ctx.dropout, seed = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    need_x, need_weight, _, need_a, *_ = ctx.needs_input_grad
    # without d_x the shape of W does: W itself may change before the backward
    kept = weight if need_x else weight.new_empty(()).expand(weight.shape)
    ctx.save_for_backward(x if need_weight or need_a else None, kept, lora_a, lora_b, output[1], seed)


def _backward(ctx, d_y: Tensor | None, _: None):  # type: ignore[no-untyped-def]
    x, weight, lora_a, lora_b, hidden, seed = ctx.saved_tensors
    if d_y is None:
        return (None,) * 8
    needs, mask = ctx.needs_input_grad[:5], (ctx.dropout, seed)
    hidden = hidden_of(
        hidden, x, needs[0] and needs[4], lambda x: reference.shrink(x.reshape(-1, x.shape[-1]), lora_a, *mask)
    )
    grads = gradients(backward_op, d_y, x, weight, lora_a, lora_b, hidden, ctx.scaling, *mask, needs)
    wanted = [g if need else None for g, need in zip(grads, needs, strict=True)]
    return *wanted, None, None, None


_run = differentiable(op, _save, _backward)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Return x W^T + b + s (drop(x) A^T) B^T.

    Differentiable, also twice, in x, bias, lora_a, lora_b, and in weight if that is being trained. Inside torch.func's
    transforms and under forward mode the plain formula runs. Under autocast all operands are cast, as by
    torch.nn.functional.linear.

    Args:
        x: float32, float16, bfloat16 or float64 of shape [..., K], any strides.
        weight: W, dtype of x, shape [N, K], any strides.
        bias: b, dtype of x, shape [N], or None.
        lora_a: A, dtype of x or float32, shape [R, K].
        lora_b: B, dtype of lora_a, shape [N, R].
        scaling: s, alpha / r.
        dropout: probability of zeroing an element of x before A, in [0, 1).
        seed: int64 tensor of one element, which fixes the mask; needed where dropout > 0.
    Returns:
        Shape [..., N], dtype of x.
    Raises:
        ShapeError, DtypeError, DeviceError: if the operands do not fit together.
        ConfigError: if scaling is no finite number, or dropout no probability or without a seed; in a
            backward that is to be differentiated in x and lora_b where lora_a is frozen, so that x is not kept.
    Source: Hu et al. 2021, eq. 3.
    """
    if isinstance(weight, Packed):
        raise DtypeError(
            "lora_linear: weight is a Packed; want a torch.Tensor: call nf4_lora_linear with the 4-bit weight"
        )
    if ready(x, weight, bias, lora_a, lora_b, scaling, dropout, seed):
        return _run(x, weight, bias, lora_a, lora_b, scaling, dropout, seed)[0]
    x, layer = prepared("lora_linear", x, Layer(weight, bias, lora_a, lora_b, scaling, dropout, seed))
    with outside_autocast(x):
        return by_formula(x, layer) if is_transformed() else _run(x, *layer)[0]
