"""A product with a factor, for every device."""

import torch
from torch import Tensor


def scaled(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """Return factor a b^T, scaled before it is rounded; a [M, K] and b [N, K] of one dtype, any strides."""
    if factor == 1.0:
        return torch.mm(a, b.T)
    return a.new_empty(a.shape[0], b.shape[0]).addmm_(a, b.T, beta=0, alpha=factor)
