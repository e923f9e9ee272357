"""LoRA forward.

A frozen layer computes x W^T + b. LoRA adds an update of low rank,

    y = x W^T + b + s (x A^T) B^T,

and never forms the product B A, which is as large as W, neither whole nor row by row.

    x        [M, K]   M tokens of K features
    weight   [N, K]   W, frozen
    bias     [N]
    lora_a   [R, K]   A, the projection down to rank R
    lora_b   [N, R]   B, the projection up
    scaling  s        alpha / r

Source: Hu et al. 2021, eq. 3.
"""

import torch
from torch import Tensor


def lora_forward(x: Tensor, weight: Tensor, bias: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """Return y, float32 of shape [M, N]."""
    raise NotImplementedError
