"""The operation lora_core::absmax_dequantize: scales of a 4-bit weight from their 8-bit codes."""

import torch
from torch import Tensor

from lora_core.errors import DtypeError, ShapeError
from lora_core.ops.absmax_quantize import check
from lora_core.ops.checks import check_devices, check_tensors
from lora_core.quant import double as reference
from lora_core.quant.double import NESTED_BLOCK_SIZE


@torch.library.custom_op("lora_core::absmax_dequantize", mutates_args=())
def op(codes: Tensor, absmax2: Tensor, offset: Tensor, block_size: int) -> Tensor:
    return reference.dequantize_absmax(codes, absmax2, offset, block_size)


@op.register_fake
def _(codes: Tensor, absmax2: Tensor, offset: Tensor, block_size: int) -> Tensor:
    return absmax2.new_empty(codes.shape)


def absmax_dequantize(codes: Tensor, absmax2: Tensor, offset: Tensor, block_size: int = NESTED_BLOCK_SIZE) -> Tensor:
    """Return level * absmax2 + offset in float32, the product and the sum rounded separately: the same bits everywhere.

    Not differentiable.

    Args:
        codes: uint8 [b].
        absmax2: float32 [ceil(b / block_size)].
        offset: float32, one element.
        block_size: scales per second-level scale.
    Returns:
        float32 [b].
    Raises:
        DtypeError, ShapeError, DeviceError, ConfigError: if the operands do not fit together.
    Source: Dettmers et al. 2023, section 3.
    """
    check("absmax_dequantize", "codes", codes, torch.uint8, offset, block_size)
    check_tensors("absmax_dequantize", {"absmax2": absmax2})
    check_devices("absmax_dequantize", {"codes": codes, "absmax2": absmax2})
    if absmax2.dtype != torch.float32:
        raise DtypeError(f"absmax_dequantize: absmax2 is {absmax2.dtype}; want torch.float32")
    check_second_level(codes, absmax2, block_size)
    absmax: Tensor = op(codes, absmax2.detach(), offset.detach(), block_size)
    return absmax


def check_second_level(codes: Tensor, absmax2: Tensor, block_size: int) -> None:
    """Raise ShapeError unless there is a second-level scale for every block of codes."""
    blocks = -(-codes.numel() // block_size)
    if absmax2.shape != (blocks,):
        raise ShapeError(
            f"absmax_dequantize: {codes.numel()} codes in blocks of {block_size} want {blocks} second-level scales; "
            f"got {tuple(absmax2.shape)}"
        )
