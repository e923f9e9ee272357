"""The operations lora_core::nf4_lora_linear and its backward: a frozen NF4 weight with a low-rank path.

The weight is dequantised for the forward and let go, and again for the backward, which needs it for dL/dx alone.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_core.errors import ConfigError
from lora_core.ops.checks import check_tensors, is_transformed, outside_autocast
from lora_core.ops.eager import differentiable, gradients, hidden_of, none_to_empty
from lora_core.ops.layer import Layer, by_formula, prepared
from lora_core.ops.packed import Packed
from lora_core.ops.ready import ready
from lora_core.quant import QuantizedWeight
from lora_core.reference import lora as reference


@torch.library.custom_op("lora_core::nf4_lora_linear", mutates_args=())
def op(
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
    packed = Packed(codes, absmax, nested_absmax, nested_offset, shape, block_size, nested_block_size)
    weight = packed.dense(x.dtype)
    y, hidden = reference.forward(x.reshape(-1, shape[1]), weight, bias, lora_a, lora_b, scaling, dropout, seed)
    return y.view(*x.shape[:-1], shape[0]), hidden


@op.register_fake
def _(
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
    return x.new_empty(*x.shape[:-1], shape[0]), lora_a.new_empty(math.prod(x.shape[:-1]), lora_a.shape[0])


@torch.library.custom_op("lora_core::nf4_lora_linear_backward", mutates_args=())
def backward_op(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_x, need_bias, need_a, need_b = needs
    columns, rows = shape
    weight = None
    if need_x:
        packed = Packed(codes, absmax, nested_absmax, nested_offset, shape, block_size, nested_block_size)
        weight = packed.dense(d_y.dtype)
    flat = None if x is None else x.reshape(-1, rows)
    wanted = (need_x, False, need_bias, need_a, need_b)
    d_x, _, *others = reference.backward(
        d_y.reshape(-1, columns), flat, weight, lora_a, lora_b, hidden, scaling, dropout, seed, wanted
    )
    grads: tuple[Tensor, Tensor, Tensor, Tensor]
    grads = none_to_empty(d_y, (None if d_x is None else d_x.view(*d_y.shape[:-1], rows), *others))
    return grads


@backward_op.register_fake
def _(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like_x, like_bias = d_y.new_empty(*d_y.shape[:-1], shape[1]), d_y.new_empty(shape[0])
    d_x, d_bias, d_lora_a, d_lora_b = (
        t.new_empty(t.shape) if need else d_y.new_empty(0)
        for t, need in zip((like_x, like_bias, lora_a, lora_b), needs, strict=True)
    )
    return d_x, d_bias, d_lora_a, d_lora_b


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, *packed, shape, block_size, nested_block_size, _, lora_a, lora_b, ctx.scaling, ctx.dropout, seed = inputs
    ctx.format = (shape, block_size, nested_block_size)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    need_x, need_bias, need_a, need_b = (ctx.needs_input_grad[i] for i in (0, 8, 9, 10))
    ctx.needs = (need_x, need_bias, need_a, need_b)
    ctx.save_for_backward(x if need_a else None, *packed, lora_a, lora_b, output[1], seed)


def _backward(ctx, d_y: Tensor | None, _: None):  # type: ignore[no-untyped-def]
    x, *packed, lora_a, lora_b, hidden, seed = ctx.saved_tensors
    if d_y is None:
        return (None,) * 14
    mask = (ctx.dropout, seed)
    hidden = hidden_of(
        hidden, x, ctx.needs[0] and ctx.needs[3], lambda x: reference.shrink(x.reshape(-1, x.shape[-1]), lora_a, *mask)
    )
    adapter = (lora_a, lora_b, hidden, ctx.scaling, *mask)
    grads = gradients(backward_op, d_y, x, *packed, *ctx.format, *adapter, ctx.needs)
    d_x, d_bias, d_lora_a, d_lora_b = (g if need else None for g, need in zip(grads, ctx.needs, strict=True))
    return d_x, *[None] * 7, d_bias, d_lora_a, d_lora_b, None, None, None


_run = differentiable(op, _save, _backward)


def nf4_lora_linear(
    x: Tensor,
    q: QuantizedWeight,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Return x W^T + b + s (drop(x) A^T) B^T for a frozen 4-bit W; without A and B, x W^T + b.

    Differentiable in x, bias, lora_a and lora_b; in torch.func's transforms as lora_linear is. No dense W outlives the
    call, in either direction. Under autocast all operands are cast, as by torch.nn.functional.linear.

    Args:
        x: float32, float16, bfloat16 or float64 of shape [..., K], any strides.
        q: W, quantised as "nf4", of shape [N, K].
        bias: b, dtype of x, shape [N], or None.
        lora_a: A, dtype of x or float32, shape [R, K]; or None.
        lora_b: B, dtype of lora_a, shape [N, R]; None with lora_a.
        scaling: s, alpha / r.
        dropout: probability of zeroing an element of x before A, in [0, 1).
        seed: int64 tensor of one element, which fixes the mask; needed where dropout > 0.
    Returns:
        Shape [..., N], dtype of x.
    Raises:
        ShapeError, DtypeError, DeviceError: if the operands do not fit together.
        ConfigError: if q is not NF4, A comes without B, scaling is no finite number, or dropout no probability or
            without a seed.
    Source: Dettmers et al. 2023 (arXiv 2305.14314), eq. 5.
    """
    if not isinstance(q, QuantizedWeight) or q.quant_type != "nf4":
        got = f"quant_type {q.quant_type!r}" if isinstance(q, QuantizedWeight) else f"a {type(q).__name__}"
        raise ConfigError(
            f"nf4_lora_linear: want q = quantize_nf4(weight), got {got}; use lora_linear with a dense weight"
        )
    return packed_lora_linear(x, Packed.of(q), bias, lora_a, lora_b, scaling, dropout, seed)


def packed_lora_linear(
    x: Tensor,
    w: Packed,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Return what nf4_lora_linear returns, for a weight given by its parts, whoever holds them."""
    if ready(x, w, bias, lora_a, lora_b, scaling, dropout, seed):
        return _run(x, *w, bias, lora_a, lora_b, scaling, dropout, seed)[0]
    if (lora_a is None) != (lora_b is None):
        raise ConfigError("nf4_lora_linear: lora_a and lora_b go together; got only one of them")
    if lora_a is None or lora_b is None:
        check_tensors("nf4_lora_linear", {"x": x})
        # an adapter of rank 0 adds nothing
        lora_a, lora_b = x.new_empty(0, *w.shape[-1:]), x.new_empty(*w.shape[:1], 0)
    x, layer = prepared("nf4_lora_linear", x, Layer(w, bias, lora_a, lora_b, scaling, dropout, seed))
    with outside_autocast(x):
        return by_formula(x, layer) if is_transformed() else _run(x, *w, *layer[1:])[0]
