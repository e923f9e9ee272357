"""The operation lora_core::dequantize: a dense weight from 4-bit codes in any codebook.

NF4 has one of its own, with kernels. This one keeps compilers from taking the formula apart: on a CPU, Inductor of
PyTorch 2.13 then leaves a short last block unwritten (PyTorch's issue 195582).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_core.quant.blockwise import dequantize_blocks
from lora_core.quant.codebook import codebook
from lora_core.quant.packing import unpack


@torch.library.custom_op("lora_core::dequantize", mutates_args=())
def op(
    codes: Tensor, absmax: Tensor, shape: Sequence[int], dtype: torch.dtype, block_size: int, quant_type: str
) -> Tensor:
    flat = dequantize_blocks(unpack(codes, math.prod(shape)), absmax, codebook(quant_type), block_size, dtype)
    return flat.view(torch.Size(shape))


@op.register_fake
def _(
    codes: Tensor, absmax: Tensor, shape: Sequence[int], dtype: torch.dtype, block_size: int, quant_type: str
) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)
