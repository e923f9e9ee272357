"""The operations lora_core::rms_norm and lora_core::rms_norm_backward.

The mathematics stands in lora_core/reference/rms_norm.py.
"""

import math

import torch
from torch import Tensor

from lora_core.errors import ConfigError, ShapeError
from lora_core.ops.checks import LARGEST, check_alike, is_transformed, outside_autocast
from lora_core.ops.eager import differentiable, gradients, none_to_empty
from lora_core.ops.ready import alike
from lora_core.reference import rms_norm as reference


@torch.library.custom_op("lora_core::rms_norm", mutates_args=())
def op(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return reference.forward(x, weight, eps)


@op.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(math.prod(x.shape[:-1]), dtype=wide)


@torch.library.custom_op("lora_core::rms_norm_backward", mutates_args=())
def backward_op(d_y: Tensor, x: Tensor, weight: Tensor, r: Tensor, need_weight: bool) -> tuple[Tensor, Tensor]:
    grads: tuple[Tensor, Tensor] = none_to_empty(d_y, reference.backward(d_y, x, weight, r, need_weight))
    return grads


@backward_op.register_fake
def _(d_y: Tensor, x: Tensor, weight: Tensor, r: Tensor, need_weight: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape if need_weight else 0)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, ctx.eps = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx, d_y: Tensor | None, _: None):  # type: ignore[no-untyped-def]
    x, weight, r = ctx.saved_tensors
    if d_y is None:
        return None, None, None
    if torch.is_grad_enabled():
        # a derivative of the gradient needs to know how r depends on x
        r = reference.forward(x, weight, ctx.eps)[1]
    need_x, need_weight, _ = ctx.needs_input_grad
    d_x, d_weight = gradients(backward_op, d_y, x, weight, r, need_weight)
    return d_x if need_x else None, d_weight if need_weight else None, None


_run = differentiable(op, _save, _backward)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight, row by row.

    Differentiable, also twice, in x and weight. Inside torch.func's transforms and under forward mode the plain formula
    runs. Sums and products are float32, or float64 where x is; computed in the dtypes given, also under autocast.

    Args:
        x: float32, float16, bfloat16 or float64 of shape [..., K], any strides.
        weight: dtype of x, shape [K].
        eps: added to the mean square, at least 0.
    Returns:
        Shape and dtype of x, contiguous.
    Raises:
        ShapeError, DtypeError, DeviceError: if the operands do not fit together.
        ConfigError: if eps is no finite number of at least 0.
    Source: Zhang and Sennrich 2019 (arXiv 1910.07467), eq. 4.
    """
    plain = alike(x, weight)
    if not plain:
        check_alike("rms_norm", {"x": x, "weight": weight})
    if x.dim() < 1 or weight.shape != x.shape[-1:] or not len(weight):
        raise ShapeError(
            f"rms_norm: want x [..., K] and weight [K], K at least 1; got x {tuple(x.shape)}, "
            f"weight {tuple(weight.shape)}"
        )
    if not isinstance(eps, (int, float)) or not 0 <= eps <= LARGEST:
        raise ConfigError(f"rms_norm: eps is {eps!r}; want a finite number of at least 0")
    if plain:
        return _run(x, weight, float(eps))[0]
    with outside_autocast(x):
        return reference.rms_norm(x, weight, eps) if is_transformed() else _run(x, weight, float(eps))[0]
