"""SwiGLU, the gate of a Llama's MLP, forward and backward, in plain PyTorch.

Forward, element by element, for the two inputs g (gate) and u (up), with sigma(g) = 1 / (1 + exp(-g)):

    y = g sigma(g) u

Backward. As sigma' = sigma (1 - sigma), the derivative of g sigma is sigma (1 + g (1 - sigma)), and with d = dL/dy

    dL/dg = d u sigma (1 + g (1 - sigma))
    dL/du = d g sigma

All that is kept between the passes is g and u; written with PyTorch's operations, g sigma(g) is as well. Computed in
float32, or in float64 where g is, and rounded once.

Source: Shazeer 2020 (arXiv 2002.05202), eq. 6, without biases.
"""

import torch
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up.

    Args:
        gate, up: floating, of one shape and dtype.
    Returns:
        Shape and dtype of gate, contiguous.
    """
    g, u = _wide(gate), _wide(up)
    return (g * torch.sigmoid(g) * u).to(gate.dtype).contiguous()


def backward(d_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return dL/dgate and dL/dup, contiguous, for d_y = dL/dy of the shape and dtype of both."""
    d, g, u = _wide(d_y), _wide(gate), _wide(up)
    sigma = torch.sigmoid(g)
    d_gate = d * u * (sigma * (1 + g * (1 - sigma)))
    d_up = d * (g * sigma)
    return d_gate.to(gate.dtype).contiguous(), d_up.to(up.dtype).contiguous()


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
