"""A solution of docs/puzzles/11-dora-norm.py."""

from torch import Tensor


def dora_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """Return the norms of the rows of W + s B A, float32 [N], without a matrix of N x K beside W."""
    mixed = 2 * scaling * (lora_b * (weight @ lora_a.T)).sum(1)
    update = scaling**2 * (lora_b * (lora_b @ (lora_a @ lora_a.T))).sum(1)
    return (weight.square().sum(1) + mixed + update).clamp(min=0).sqrt()
