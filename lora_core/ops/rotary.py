"""The operations lora_core::rotary and lora_core::rotary_backward.

The mathematics stands in lora_core/reference/rotary.py.
"""

import torch
from torch import Tensor

from lora_core.errors import ConfigError, ShapeError
from lora_core.ops.checks import check_alike, is_transformed, outside_autocast
from lora_core.ops.eager import differentiable, gradients
from lora_core.ops.ready import alike
from lora_core.reference import rotary as reference


@torch.library.custom_op("lora_core::rotary", mutates_args=())
def op(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return reference.rotary(x, cos, sin)


@torch.library.custom_op("lora_core::rotary_backward", mutates_args=())
def backward_op(d_y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return reference.backward(d_y, cos, sin)


@op.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@backward_op.register_fake
def _(d_y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    b, h, t, d = d_y.shape
    return d_y.new_empty(b, t, h, d).transpose(1, 2)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx, d_y: Tensor):  # type: ignore[no-untyped-def]
    return gradients(backward_op, d_y, *ctx.saved_tensors), None, None


_run = differentiable(op, _save, _backward)


def are_heads(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Say whether rotary takes tensors of these shapes."""
    return (
        x.dim() == 4
        and x.shape[3] % 2 == 0
        and cos.shape == sin.shape
        and cos.shape[1:] == x.shape[2:]
        and (cos.shape[0] == 1 or cos.shape[0] == x.shape[0])
    )


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x with both halves of every head rotated by the angles of its position, as Llama's attention does.

    Differentiable, also twice, in x. Inside torch.func's transforms and under forward mode the plain formula runs.
    Computed in float32, or in float64 where x is, and rounded once; also under autocast.

    Args:
        x: float32, float16, bfloat16 or float64 of shape [B, H, T, D], any strides: batch, heads, tokens, and an even
            number of elements a head.
        cos, sin: of the angles, dtype of x, shape [B, T, D], or [1, T, D] for all of a batch.
    Returns:
        Shape and dtype of x, contiguous: head by head, as attention reads it.
    Raises:
        ShapeError, DtypeError, DeviceError: if the operands do not fit together.
        ConfigError: if cos or sin require a gradient, which is not made.
    Source: Su et al. 2021 (arXiv 2104.09864), eq. 34, with halves in place of neighbours.
    """
    plain = alike(x, cos, sin)
    if not plain:
        check_alike("rotary", {"x": x, "cos": cos, "sin": sin})
    if not are_heads(x, cos, sin):
        raise ShapeError(
            "rotary: want x [B, H, T, D], D even, and cos and sin [B, T, D] or [1, T, D]; got "
            f"x {tuple(x.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"
        )
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise ConfigError("rotary: cos or sin requires a gradient, which is not made: pass them with .detach()")
    y: Tensor
    if plain:
        y = _run(x, cos, sin)
        return y
    with outside_autocast(x):
        y = reference.rotary(x, cos, sin) if is_transformed() else _run(x, cos, sin)
        return y
