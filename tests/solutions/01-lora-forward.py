"""A solution of docs/puzzles/01-lora-forward.py."""

from torch import Tensor


def lora_forward(x: Tensor, weight: Tensor, bias: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """Return y, float32 of shape [M, N]."""
    return x @ weight.T + bias + scaling * (x @ lora_a.T) @ lora_b.T
