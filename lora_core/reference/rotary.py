"""Rotary position embedding, forward and backward, in plain PyTorch.

Forward, for a head x of D numbers at a position with cosines c and sines s, D numbers each; x, c and s are split into
halves, x = (x1, x2), as Llama pairs what is rotated:

    y1 = x1 c1 - x2 s1
    y2 = x2 c2 + x1 s2

Backward. The map is linear, so with g = dL/dy the gradient is that of the transposed one:

    dL/dx1 = g1 c1 + g2 s2
    dL/dx2 = g2 c2 - g1 s1

The halves of c are mostly alike, and those of s, and then this is a rotation by the opposite angle; nothing here takes
that for granted. All that is kept between the passes is c and s. Computed in float32, or in float64 where x is, and
rounded once.

Source: Su et al. 2021 (arXiv 2104.09864), eq. 34, with halves in place of neighbours.
"""

import torch
from torch import Tensor


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x rotated by its positions' angles.

    Args:
        x: floating, shape [B, H, T, D], D even.
        cos, sin: dtype of x, shape [B, T, D], or [1, T, D] for all of a batch.
    Returns:
        Shape and dtype of x, contiguous: head by head, as attention reads it.
    """
    (x1, x2), (c1, c2), (s1, s2) = map(_halves, (x, cos[:, None], sin[:, None]))
    return torch.cat((x1 * c1 - x2 * s1, x2 * c2 + x1 * s2), -1).to(x.dtype).contiguous()


def backward(d_y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return dL/dx for d_y = dL/dy, both [B, H, T, D], token by token, as a projection wrote x.

    That is, the result's transpose(1, 2) is contiguous.
    """
    (g1, g2), (c1, c2), (s1, s2) = map(_halves, (d_y, cos[:, None], sin[:, None]))
    d_x = torch.cat((g1 * c1 + g2 * s2, g2 * c2 - g1 * s1), -1)
    return d_x.to(d_y.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def _halves(t: Tensor) -> tuple[Tensor, Tensor]:
    first, second = t.to(torch.promote_types(t.dtype, torch.float32)).chunk(2, -1)
    return first, second
