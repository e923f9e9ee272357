"""Making a weight 4-bit."""

import torch
from torch import Tensor

from lora_core.errors import ConfigError, DtypeError
from lora_core.quant import operations
from lora_core.quant.blockwise import (
    check_block_size,
    check_input,
    check_nested_block_size,
    has_values,
    quantize_blocks,
)
from lora_core.quant.codebook import codebook
from lora_core.quant.double import NESTED_BLOCK_SIZE, lower_overflowing
from lora_core.quant.packing import pack
from lora_core.quant.parts import check_four_bit
from lora_core.quant.weight import QuantizedWeight


def quantize(
    weight: Tensor,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    nested_block_size: int = NESTED_BLOCK_SIZE,
) -> QuantizedWeight:
    """Return a weight in 4 bits.

    Args:
        weight: float32, float16 or bfloat16 of any shape and strides; not changed.
        quant_type: "nf4", "fp4" or "int4". No level of "int4" is zero: beside quantised scales a block of zeros comes
            back near zero, not as zero.
        block_size: elements sharing one scale; a power of two from 32 to 4096.
        double_quant: quantise the scales too.
        nested_block_size: quantised scales sharing one second-level scale; bitsandbytes takes the default.
    Raises:
        DtypeError: if the weight is of another dtype, or sparse.
        NonFiniteError: if it holds NaN or infinity.
        ConfigError: if quant_type, block_size, double_quant or nested_block_size is none of the above.
    Source: Dettmers et al. 2023, section 3.
    """
    if not isinstance(weight, Tensor):
        raise DtypeError(f"cannot quantise a {type(weight).__name__}: want a torch.Tensor")
    weight = weight.detach()
    check_four_bit(quant_type)
    if not isinstance(double_quant, bool):
        raise ConfigError(f"cannot quantise: double_quant is {double_quant!r}; want True or False")
    book, block_size = codebook(quant_type), check_block_size("cannot quantise", block_size)
    nested_block_size = check_nested_block_size("cannot quantise", nested_block_size)
    check_input(weight)
    if quant_type == "nf4":
        packed, absmax = operations.run(torch.ops.lora_core.nf4_quantize, weight, block_size)
    else:
        codes, absmax = quantize_blocks(weight, book, block_size)
        packed = pack(codes, book.zero)[:, None]
    absmax2 = offset = None
    if double_quant:
        offset = operations.run(torch.ops.lora_core.absmax_offset, absmax)
        near_overflow = has_values(absmax) and bool(absmax.max() > torch.finfo(weight.dtype).max / 2)
        absmax, absmax2 = operations.run(torch.ops.lora_core.absmax_quantize, absmax, offset, nested_block_size)
        if near_overflow:
            absmax = lower_overflowing(absmax, absmax2, offset, weight.dtype, nested_block_size)
    return QuantizedWeight(
        packed,
        absmax,
        absmax2,
        offset,
        shape=weight.shape,
        dtype=weight.dtype,
        quant_type=quant_type,
        block_size=block_size,
        nested_block_size=nested_block_size,
    )


def quantize_nf4(weight: Tensor, block_size: int = 64, double_quant: bool = True) -> QuantizedWeight:
    """Return a weight in NF4, the 4-bit code whose levels suit normally distributed weights.

    Args:
        weight: float32, float16 or bfloat16, any shape and strides.
        block_size: elements sharing one scale; a power of two from 32 to 4096.
        double_quant: quantise the scales to 8 bits as well.
    Returns:
        The frozen weight, on the same device.
    Raises:
        DtypeError, ConfigError: if the weight or the block size cannot be.
        NonFiniteError: if the weight holds NaN or infinity, saying where.
    Source: Dettmers et al. 2023, section 3.
    """
    return quantize(weight, "nf4", block_size, double_quant)
