"""Double quantisation: the scales of the blocks are themselves stored in 8 bits.

    offset = mean(absmax);   absmax - offset in blocks of 256, codes into the signed dynamic map
    absmax ~ level * absmax2 + offset, the product and the sum rounded separately

32 bits a scale become 8 + 32/256: at a block size of 64, 0.5 bits a weight become 0.127.
Source: Dettmers et al. 2023 (arXiv 2305.14314), section 3.
"""

import torch
from torch import Tensor

from lora_core.quant.blockwise import quantize_blocks
from lora_core.quant.codebook import codebook

NESTED_BLOCK_SIZE = 256


def absmax_offset(absmax: Tensor) -> Tensor:
    """Return the mean of scales, float32 []: computed here once, as its last bit depends on the order of summation."""
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    # a float32 sum of the largest scales can overflow although their mean does not
    return torch.where(offset.isfinite(), offset, absmax.double().mean().float())


def quantize_absmax(absmax: Tensor, offset: Tensor, block_size: int = NESTED_BLOCK_SIZE) -> tuple[Tensor, Tensor]:
    """Return (codes, absmax2) of scales.

    Args:
        absmax: float32 [b], not negative.
        offset: float32, one element.
        block_size: scales per second-level scale.
    Returns:
        codes uint8 [b], absmax2 float32 [ceil(b / block_size)].
    """
    # a block is no larger than what there is, or it would be filled up
    return quantize_blocks(absmax - offset, codebook("dynamic"), min(block_size, max(absmax.numel(), 1)))


def lower_overflowing(
    codes: Tensor, absmax2: Tensor, offset: Tensor, dtype: torch.dtype, block_size: int = NESTED_BLOCK_SIZE
) -> Tensor:
    """Return the codes of scales, one lower where a scale would come back as infinity.

    The nearest code can stand for more than the scale it was chosen for, and the largest scale may be the largest
    number that float32, or the weight's dtype, has. The code below stands for no more than that scale.

    Args:
        codes: uint8 [b]; absmax2, offset, block_size: as quantize_absmax has them.
        dtype: of the weight.
    """
    over = dequantize_absmax(codes, absmax2, offset, block_size).to(dtype).isinf()
    return codes - over.to(codes.dtype)


def dequantize_absmax(
    codes: Tensor, absmax2: Tensor, offset: Tensor, block_size: int = NESTED_BLOCK_SIZE, levels: Tensor | None = None
) -> Tensor:
    """Return level * absmax2 + offset in float32, each operation rounded.

    Args:
        codes: uint8 [b].
        absmax2: float32 [ceil(b / block_size)].
        offset: float32, one element.
        block_size: scales per second-level scale.
        levels: float32 [256]; by default the signed dynamic map.
    Returns:
        float32 [b].
    """
    table = (codebook("dynamic").levels if levels is None else levels).to(codes.device)
    # a block is no larger than what there is, whatever a file says
    scale = absmax2.repeat_interleave(min(block_size, max(codes.numel(), 1)))[: codes.numel()]
    product = table[codes.int()] * scale
    return product + offset
