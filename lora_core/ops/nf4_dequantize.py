"""The operation lora_core::nf4_dequantize: a dense weight from codes and plain or double-quantised scales."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lora_core.errors import ConfigError
from lora_core.quant.double import NESTED_BLOCK_SIZE
from lora_core.quant.parts import check_dtype, check_parts
from lora_core.reference import nf4 as reference


@torch.library.custom_op("lora_core::nf4_dequantize", mutates_args=())
def op(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    block_size: int,
    nested_block_size: int = NESTED_BLOCK_SIZE,
) -> Tensor:
    return reference.nf4_dequantize(
        codes, absmax, nested_absmax, nested_offset, shape, dtype, block_size, nested_block_size
    )


@op.register_fake
def _(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    block_size: int,
    nested_block_size: int = NESTED_BLOCK_SIZE,
) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)


def nf4_dequantize(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    block_size: int = 64,
    nested_block_size: int = NESTED_BLOCK_SIZE,
) -> Tensor:
    """Return level[code] * absmax, multiplied in float32 and rounded once to dtype; the same bits on every device.

    Not differentiable: the weight is frozen.

    Args:
        codes: packed codes, uint8 with (n + 1) // 2 elements.
        absmax: float32 [ceil(n / block_size)], or its uint8 codes where nested_absmax is given.
        nested_absmax: float32 [ceil(len(absmax) / nested_block_size)], or None.
        nested_offset: float32, one element, or None.
        shape: of the weight, n elements.
        dtype: of the result, floating.
        block_size: elements sharing one scale.
        nested_block_size: scales sharing one second-level scale.
    Returns:
        A new tensor of that shape and dtype.
    Raises:
        ShapeError, DtypeError, DeviceError, ConfigError: if the operands do not fit together.
    Source: Dettmers et al. 2023, eq. 5 and 6.
    """
    name = "nf4_dequantize"
    check_parts(name, codes, absmax, nested_absmax, nested_offset, shape, block_size, nested_block_size)
    check_dtype(f"{name}: cannot return", dtype)
    _refuse_tangents(name, absmax, nested_absmax, nested_offset)
    return op(codes, absmax, nested_absmax, nested_offset, shape, dtype, block_size, nested_block_size)


def _refuse_tangents(name: str, *tensors: Tensor | None) -> None:
    """Raise ConfigError under forward-mode differentiation, which would take the result for a constant."""
    if forward_ad._current_level < 0:
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise ConfigError(
            f"{name} has no forward-mode derivative (torch.func.jvp, forward_ad): lora_core.reference has"
        )
