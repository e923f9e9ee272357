"""The LoRA linear layer, forward and backward, in plain PyTorch.

Forward, for x [M, K], W [N, K], A [R, K], B [N, R]:

    D = drop(x)                 keep * x / (1 - p); x itself at p = 0
    S = D A^T                   [M, R], the hidden state, small: saved for the backward
    y = x W^T + b + s S B^T     [M, N]

Backward. With G = dL/dy, and dL = <G, dy> for every change of an input:

    dy = s dS B^T      gives   dL = <s G B, dS>,          so  dL/dS = s G B                 2 M N R operations
    dy = s S dB^T      gives   dL = <G, s S dB^T>,        so  dL/dB = s G^T S               2 M N R
    dS = D dA^T        gives   dL = <dL/dS, D dA^T>,      so  dL/dA = (dL/dS)^T D           2 M K R
    dy = dx W^T and dS = (keep dx / (1 - p)) A^T
                       gives   dL/dx = G W + keep * ((dL/dS) A) / (1 - p)                   2 M N K + 2 M K R
    dy = 1 db^T        gives   dL/db = column sums of G                                     M N

W is frozen: dL/dW = G^T x, another 2 M N K operations and N K numbers, is never formed unless W itself is being
trained. All that is kept between the passes is x, S and the parameters.

Where A and B are kept in float32 over a half-precision W, the low-rank path runs in float32 and the sum is rounded to
the dtype of x; over a float64 W the sum is made in float64.

Source: Hu et al. 2021 (arXiv 2106.09685), eq. 3; dropout before A as in the authors' loralib.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.reference.dropout import Drop
from lora_core.reference.dropout import dropout as drop


def lora_delta(
    x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, dropout: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """Return s (drop(x) A^T) B^T, what the adapter adds to the output.

    Args:
        x: shape [..., K].
        lora_a: A, shape [R, K].
        lora_b: B, shape [N, R].
        scaling: s.
        dropout: probability p of zeroing an element of x.
        seed: int64, one element; needed where p > 0.
    Returns:
        Shape [..., N].
    """
    return scaling * F.linear(F.linear(drop(x, dropout, seed), lora_a), lora_b)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Return x W^T + b + s (drop(x) A^T) B^T, as one would write it on a board.

    Args:
        x: shape [..., K].
        weight: W, shape [N, K].
        bias: b, shape [N], or None.
        lora_a, lora_b, scaling, dropout, seed: as in lora_delta.
    Returns:
        Shape [..., N], dtype of x.
    """
    update = lora_delta(x.to(lora_a.dtype), lora_a, lora_b, scaling, dropout, seed)
    return (F.linear(x, weight, bias) + update).to(x.dtype)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    drop: Drop = drop,
) -> tuple[Tensor, Tensor]:
    """Return (y [M, N], S [M, R]) for x [M, K]: lora_linear without a temporary of y's size."""
    hidden = shrink(x, lora_a, dropout, seed, drop)
    return expand(x, weight, bias, hidden, lora_b, scaling), hidden


def shrink(x: Tensor, lora_a: Tensor, dropout: float = 0.0, seed: Tensor | None = None, drop: Drop = drop) -> Tensor:
    """Return S = drop(x) A^T, shape [M, R], in the dtype of A."""
    return drop(x.to(lora_a.dtype), dropout, seed) @ lora_a.T


def expand(x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """Return y = x W^T + b + s S B^T; the update is added in place, by a matrix product that accumulates."""
    y = F.linear(x, weight, bias)
    wide = torch.promote_types(y.dtype, lora_b.dtype)
    return y.to(wide).addmm_(hidden.to(wide), lora_b.T.to(wide), alpha=scaling).to(x.dtype)


def backward(
    d_y: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    hidden: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    needs: Sequence[bool],
    drop: Drop = drop,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients (d_x, d_weight, d_bias, d_lora_a, d_lora_b) that needs asks for, None for the others.

    Args:
        d_y: G, shape [M, N].
        x: shape [M, K]; enters d_weight and d_lora_a only, else None will do.
        weight: shape [N, K]; enters d_x only, else None will do.
        lora_a, lora_b, hidden, scaling, dropout, seed: as the forward had or made them.
        needs: five flags.
        drop: computes keep * x / (1 - p).
    """
    need_x, need_weight, need_bias, need_a, need_b = needs
    low = d_y.to(lora_a.dtype)
    d_x = d_weight = d_bias = d_lora_a = d_lora_b = None
    if need_b:
        d_lora_b = (low.T @ hidden).mul_(scaling)
    if need_a or need_x:
        d_s = (low @ lora_b).mul_(scaling)
    if need_a and x is not None:
        d_lora_a = d_s.T @ drop(x.to(lora_a.dtype), dropout, seed)
    if need_x and weight is not None:
        wide = torch.promote_types(d_y.dtype, lora_a.dtype)
        d_x = (d_y @ weight).to(wide)
        # the mask depends on position alone, so it is applied to the gradient as to x
        d_x = d_x.addmm_(d_s.to(wide), lora_a.to(wide)) if dropout == 0 else d_x.add_(drop(d_s @ lora_a, dropout, seed))
        d_x = d_x.to(d_y.dtype)
    if need_bias:
        d_bias = d_y.sum(0)
    if need_weight and x is not None:
        d_weight = d_y.T @ x
    return d_x, d_weight, d_bias, d_lora_a, d_lora_b
