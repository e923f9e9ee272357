"""The operation lora_core::nf4_quantize: codes and scales of a weight."""

import torch
from torch import Tensor

from lora_core.ops.checks import check_tensors
from lora_core.quant.blockwise import check_block_size, check_input
from lora_core.reference import nf4 as reference


@torch.library.custom_op("lora_core::nf4_quantize", mutates_args=())
def op(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    return reference.nf4_quantize(weight, block_size)


@op.register_fake
def _(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    n = weight.numel()
    codes = weight.new_empty((n + 1) // 2, 1, dtype=torch.uint8)
    return codes, weight.new_empty((n + block_size - 1) // block_size, dtype=torch.float32)


def nf4_quantize(weight: Tensor, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Return (codes, absmax): nearest NF4 level of each element over its block's largest magnitude.

    Not differentiable: rounding has no useful gradient.

    Args:
        weight: float32, float16 or bfloat16 of any shape and strides, n elements.
        block_size: elements sharing one scale; a power of two from 32 to 4096.
    Returns:
        Packed codes, uint8 [(n + 1) // 2, 1], and absmax, float32 [ceil(n / block_size)].
    Raises:
        DtypeError: if weight is of another dtype, or sparse.
        ConfigError: if block_size is not one of the above.
        NonFiniteError: if weight holds NaN or infinity.
    Source: Dettmers et al. 2023, section 3.
    """
    check_tensors("nf4_quantize", {"weight": weight})
    block_size = check_block_size("nf4_quantize", block_size)
    check_input(weight)
    # detached: a custom operation marks what comes of a trained weight as differentiable
    codes, absmax = op(weight.detach(), block_size)
    return codes, absmax
