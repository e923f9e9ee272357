"""A solution of docs/puzzles/04-nf4-quantize.py."""

import torch
from torch import Tensor

from lora_core.quant.codebook import codebook

LEVELS = codebook("nf4").levels  # [16], sorted
MIDPOINTS = codebook("nf4").midpoints  # [15]


def quantize(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return codes, uint8 [n], and absmax, float32, one a block."""
    n = weight.numel()
    blocks = torch.nn.functional.pad(weight, (0, -n % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(1)
    scaled = blocks / torch.where(absmax == 0, 1, absmax)[:, None]
    return torch.bucketize(scaled, MIDPOINTS).to(torch.uint8).flatten()[:n], absmax
