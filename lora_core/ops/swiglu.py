"""The operations lora_core::swiglu and lora_core::swiglu_backward.

The mathematics stands in lora_core/reference/swiglu.py.
"""

import torch
from torch import Tensor

from lora_core.errors import ShapeError
from lora_core.ops.checks import check_alike, is_transformed, outside_autocast
from lora_core.ops.eager import differentiable, gradients
from lora_core.ops.ready import alike
from lora_core.reference import swiglu as reference


@torch.library.custom_op("lora_core::swiglu", mutates_args=())
def op(gate: Tensor, up: Tensor) -> Tensor:
    return reference.swiglu(gate, up)


@op.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("lora_core::swiglu_backward", mutates_args=())
def backward_op(d_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return reference.backward(d_y, gate, up)


@backward_op.register_fake
def _(d_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, d_y: Tensor):  # type: ignore[no-untyped-def]
    grads = gradients(backward_op, d_y, *ctx.saved_tensors)
    return tuple(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=True))


_run = differentiable(op, _save, _backward)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up.

    Differentiable, also twice, in both. Inside torch.func's transforms and under forward mode the plain formula runs.
    Computed in float32, or in float64 where the operands are, and rounded once; also under autocast.

    Args:
        gate: float32, float16, bfloat16 or float64, any shape and strides.
        up: shape and dtype of gate.
    Returns:
        Shape and dtype of gate, contiguous.
    Raises:
        ShapeError, DtypeError, DeviceError: if the operands do not fit together.
    Source: Shazeer 2020 (arXiv 2002.05202), eq. 6, without biases.
    """
    plain = alike(gate, up)
    if not plain:
        check_alike("swiglu", {"gate": gate, "up": up})
    if gate.shape != up.shape:
        raise ShapeError(f"swiglu: want gate and up of one shape; got gate {tuple(gate.shape)}, up {tuple(up.shape)}")
    y: Tensor
    if plain:
        y = _run(gate, up)
        return y
    with outside_autocast(gate):
        y = reference.swiglu(gate, up) if is_transformed() else _run(gate, up)
        return y
