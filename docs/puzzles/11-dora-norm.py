"""DoRA norm without B A.

DoRA divides each row of V = W + s B A by its norm. Forming B A costs a second weight; the norm does not need it:

    |V_n|^2 = |W_n + s (B A)_n|^2

is the square of a sum. Multiply out, and put the brackets so that only small matrices are made.

    weight   [N, K]        lora_a  [R, K]        lora_b  [N, R]        scaling  s

Source: Liu et al. 2024, eq. 5.
"""

import torch
from torch import Tensor


def dora_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """Return the norms of the rows of W + s B A, float32 [N], without a matrix of N x K beside W."""
    raise NotImplementedError
