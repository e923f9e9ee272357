"""NF4: quantise and dequantise a weight, with plain or double-quantised scales, and QLoRA's layer on it.

    quantise:    absmax_j = max |w_i| of block j;  code_i = nearest NF4 level to w_i / absmax_j;  two codes a byte
    dequantise:  w_i = level[code_i] * absmax_j, in float32, rounded once to the output dtype
    nested:      absmax_j = level8[q_j] * absmax2 + offset first
    QLoRA:       y = x W^T + b + s (drop(x) A^T) B^T,  W = dequantise(codes, absmax)

Source: Dettmers et al. 2023 (arXiv 2305.14314), sections 2 and 3; eq. 5 for the layer.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_core.quant.blockwise import dequantize_blocks, quantize_blocks
from lora_core.quant.codebook import codebook
from lora_core.quant.double import NESTED_BLOCK_SIZE, dequantize_absmax
from lora_core.quant.packing import pack, unpack
from lora_core.reference.lora import lora_linear


def nf4_quantize(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return packed codes, uint8 [(n + 1) // 2, 1], and absmax, float32 [ceil(n / block_size)].

    Args:
        weight: float32, float16 or bfloat16 of any shape, n elements.
        block_size: elements sharing one scale.
    """
    book = codebook("nf4")
    codes, absmax = quantize_blocks(weight, book, block_size)
    return pack(codes, book.zero)[:, None], absmax


def nf4_dequantize(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    block_size: int,
    nested_block_size: int = NESTED_BLOCK_SIZE,
) -> Tensor:
    """Return the weight.

    Args:
        codes: packed codes, uint8 with (n + 1) // 2 elements.
        absmax: float32 [ceil(n / block_size)], or its uint8 codes where nested_absmax is given.
        nested_absmax: float32, second-level scales, or None.
        nested_offset: float32, one element, or None.
        shape: of the weight.
        dtype: of the result.
        block_size: elements sharing one scale.
        nested_block_size: scales sharing one second-level scale.
    """
    if nested_absmax is not None and nested_offset is not None:
        absmax = dequantize_absmax(absmax, nested_absmax, nested_offset, nested_block_size)
    flat = dequantize_blocks(unpack(codes, math.prod(shape)), absmax, codebook("nf4"), block_size, dtype)
    return flat.view(torch.Size(shape))


def nf4_lora_linear(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    block_size: int,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    nested_block_size: int = NESTED_BLOCK_SIZE,
) -> Tensor:
    """Return x W^T + b + s (drop(x) A^T) B^T for the weight that codes and scales stand for, rounded to x's dtype.

    Args:
        x: shape [..., K].
        codes, absmax, nested_absmax, nested_offset, block_size, nested_block_size: as in nf4_dequantize.
        shape: of W, [N, K].
        bias: b, shape [N], or None.
        lora_a, lora_b, scaling, dropout, seed: as in reference.lora.lora_delta.
    Returns:
        Shape [..., N], dtype of x.
    """
    weight = nf4_dequantize(codes, absmax, nested_absmax, nested_offset, shape, x.dtype, block_size, nested_block_size)
    return lora_linear(x, weight, bias, lora_a, lora_b, scaling, dropout, seed)
