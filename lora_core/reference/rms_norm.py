"""RMS normalisation, forward and backward, in plain PyTorch.

Forward, for a row x of K numbers and weights w:

    r = 1 / sqrt(mean(x^2) + eps)
    n = x r
    y = n w

Backward. With g = dL/dy and h = g w, and as r depends on every x:

    dr = -r^3 <x, dx> / K = -r^2 <n, dx> / K
    dL = <h, r dx + x dr>      gives   dL/dx = r (h - n <h, n> / K)
    dy = n dw                  gives   dL/dw = sum over rows of g n

All that is kept between the passes is x, w and r, one number a row; written with PyTorch's operations, half a dozen
tensors of x's size are. Sums and products are float32, or float64 where x is, and rounded once.

Source: Zhang and Sennrich 2019 (arXiv 1910.07467), eq. 4.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight, as one would write it on a board; shapes and dtypes as in forward."""
    return forward(x, weight, eps)[0]


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return y and r.

    Args:
        x: floating, shape [..., K].
        weight: w, dtype of x, shape [K].
        eps: added to the mean square.
    Returns:
        y: shape and dtype of x, contiguous.
        r: shape [M], a number a row, float32, or float64 where x is.
    """
    flat = _wide(x).reshape(-1, x.shape[-1])
    r = torch.rsqrt(flat.square().mean(1) + eps)
    y = (flat * r[:, None] * _wide(weight)).to(x.dtype)
    return y.contiguous().view(x.shape), r


def backward(d_y: Tensor, x: Tensor, weight: Tensor, r: Tensor, need_weight: bool) -> tuple[Tensor, Tensor | None]:
    """Return dL/dx, and dL/dw where it is needed.

    Args:
        d_y: dL/dy, shape and dtype of x, as is the gradient, which is contiguous.
        x: shape [..., K].
        weight: w, shape [K].
        r: as the forward returned it, shape [M].
        need_weight: whether w is trained.
    """
    columns = x.shape[-1]
    flat, g = (_wide(t).reshape(-1, columns) for t in (x, d_y))
    h, row = g * _wide(weight), r[:, None]
    n = flat * row
    d_x = row * (h - n * (h * n).mean(1, keepdim=True))
    d_weight = (g * n).sum(0).to(weight.dtype) if need_weight else None
    return d_x.to(x.dtype).contiguous().view(x.shape), d_weight


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
