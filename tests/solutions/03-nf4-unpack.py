"""A solution of docs/puzzles/03-nf4-unpack.py."""

import torch
from torch import Tensor


def unpack(packed: Tensor, n: int) -> Tensor:
    """Return the codes, uint8 of shape [n], each below 16."""
    return torch.stack([packed >> 4, packed & 15], dim=-1).flatten()[:n]
