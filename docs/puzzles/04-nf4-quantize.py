"""NF4 quantise.

    absmax[j] = largest |w| of block j
    code[i]   = how many MIDPOINTS are below w[i] / absmax[i // block_size]: the number of the nearest level

    weight      float32 [n], n not always a multiple of block_size
    block_size  weights that share one scale

MIDPOINTS[c] is the float32 half-way between levels c and c + 1; a value on it belongs to the lower one. A block of
zeros has absmax 0 and the code of zero, 7. Weights may be tiny, and results are compared to the bit: divide by absmax
as it is, and don't multiply by its reciprocal, which rounds twice.

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
