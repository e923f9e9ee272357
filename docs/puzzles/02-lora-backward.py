"""LoRA backward by hand.

Of  y = x W^T + s (x A^T) B^T  and  G = dL/dy  [M, N], find dL/dx, dL/dA and dL/dB without autograd. The weight is
frozen: its gradient, the largest of all, is never formed.

    d_y      [M, N]   G
    x        [M, K]
    weight   [N, K]
    lora_a   [R, K]
    lora_b   [N, R]
    scaling  s

Write S = x A^T first. Whatever reaches y in two ways has a gradient of two terms.
"""

import torch
from torch import Tensor


def lora_backward(
    d_y: Tensor, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dL/dx [M, K], dL/dA [R, K] and dL/dB [N, R], in this order."""
    raise NotImplementedError
