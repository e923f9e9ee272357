"""The operations lora_core::absmax_quantize and absmax_offset: scales of a 4-bit weight in 8 bits, and their mean."""

import torch
from torch import Tensor

from lora_core.errors import DtypeError, ShapeError
from lora_core.ops.checks import check_devices, check_tensors
from lora_core.quant import double as reference
from lora_core.quant.blockwise import check_finite, check_nested_block_size
from lora_core.quant.double import NESTED_BLOCK_SIZE


@torch.library.custom_op("lora_core::absmax_quantize", mutates_args=())
def op(absmax: Tensor, offset: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    return reference.quantize_absmax(absmax, offset, block_size)


@op.register_fake
def _(absmax: Tensor, offset: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    blocks = (absmax.numel() + block_size - 1) // block_size
    return absmax.new_empty(absmax.numel(), dtype=torch.uint8), absmax.new_empty(blocks)


# an operation, so that a compiler, which would sum in another order, leaves the last bit alone
@torch.library.custom_op("lora_core::absmax_offset", mutates_args=())
def offset_op(absmax: Tensor) -> Tensor:
    return reference.absmax_offset(absmax)


@offset_op.register_fake
def _(absmax: Tensor) -> Tensor:
    return absmax.new_empty(())


def absmax_quantize(absmax: Tensor, offset: Tensor, block_size: int = NESTED_BLOCK_SIZE) -> tuple[Tensor, Tensor]:
    """Return (codes, absmax2): the level of the signed dynamic map nearest to (absmax - offset) / absmax2.

    Not differentiable. A value half-way between two levels takes the even code.

    Args:
        absmax: float32 [b].
        offset: float32, one element: quant.double.absmax_offset(absmax).
        block_size: scales per second-level scale.
    Returns:
        codes uint8 [b], absmax2 float32 [ceil(b / block_size)].
    Raises:
        DtypeError, ShapeError, DeviceError, ConfigError: if the operands do not fit together.
        NonFiniteError: if absmax or offset holds NaN or infinity.
    Source: Dettmers et al. 2023, section 3.
    """
    check("absmax_quantize", "absmax", absmax, torch.float32, offset, block_size)
    check_finite(absmax, "scales to quantise")
    check_finite(offset, "the offset of scales to quantise")
    codes, absmax2 = op(absmax.detach(), offset.detach(), block_size)
    return codes, absmax2


def check(op: str, name: str, scales: Tensor, dtype: torch.dtype, offset: Tensor, block_size: int) -> None:
    """Raise unless the operands that both directions share are sound: scales of this name and dtype, and an offset."""
    check_tensors(op, {name: scales, "offset": offset})
    check_devices(op, {name: scales, "offset": offset})
    check_nested_block_size(op, block_size)
    if offset.numel() != 1 or scales.dim() != 1:
        raise ShapeError(
            f"{op}: want {name} [b] and an offset of one element; got {tuple(scales.shape)} and {tuple(offset.shape)}"
        )
    if scales.dtype != dtype or offset.dtype != torch.float32:
        raise DtypeError(
            f"{op}: want {name} of {dtype} and an offset of torch.float32; got {scales.dtype} and {offset.dtype}"
        )
