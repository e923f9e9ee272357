"""NF4 quantise.

    absmax[j] = largest |w| of block j
    code[i]   = the level nearest to w[i] / absmax[i // block_size]

    weight      float32 [n], n not always a multiple of block_size
    block_size  weights that share one scale

A value half-way between two levels belongs to the lower one. A block of zeros has absmax 0 and the code of zero, 7.
MIDPOINTS[c] lies between levels c and c + 1. Results are compared to the bit: divide by absmax, don't multiply by its
reciprocal, which rounds twice.

Source: Dettmers et al. 2023, section 3.
"""

import torch
from torch import Tensor

from lora_core.quant.codebook import codebook

LEVELS = codebook("nf4").levels  # [16], sorted
MIDPOINTS = codebook("nf4").midpoints  # [15]


def quantize(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return codes, uint8 [n], and absmax, float32, one a block."""
    raise NotImplementedError
