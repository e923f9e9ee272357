"""A solution of docs/puzzles/02-lora-backward.py."""

from torch import Tensor


def lora_backward(
    d_y: Tensor, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dL/dx [M, K], dL/dA [R, K] and dL/dB [N, R], in this order."""
    d_s = scaling * d_y @ lora_b
    return d_y @ weight + d_s @ lora_a, d_s.T @ x, scaling * d_y.T @ (x @ lora_a.T)
