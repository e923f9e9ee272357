"""Several LoRA linear layers of one x, as query, key and value are, or gate and up: forward and backward.

Forward, for x [M, K] and layers i with W_i [N_i, K], A_i [R_i, K], B_i [N_i, R_i]:

    S = x A^T                       A = all A_i on top of each other: one read of x, S = [S_1 | S_2 | ...]
    y_i = x W_i^T + b_i + s_i S_i B_i^T

Backward. Each layer is that of lora_core/reference/lora.py, and x enters all of them, so with G_i = dL/dy_i

    dL/dS_i = s_i G_i B_i           dL/dB_i = s_i G_i^T S_i
    dL/dA = (dL/dS)^T x             again one read of x
    dL/dx = sum_i G_i W_i + (dL/dS) A

The sum over i is formed in place: nothing of x's size is there beside x and its gradient. With dropout each layer has a
mask of its own, x_i = drop_i(x): then S_i and dL/dA_i read x once for each layer.

Source: Hu et al. 2021 (arXiv 2106.09685), eq. 3, for each layer.
"""

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lora_core.reference import lora
from lora_core.reference.dropout import Drop
from lora_core.reference.dropout import dropout as drop


def forward(
    x: Tensor,
    weights: Iterable[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scalings: Sequence[float],
    dropouts: Sequence[float],
    seeds: Sequence[Tensor | None],
    drop: Drop = drop,
) -> tuple[list[Tensor], Tensor]:
    """Return (every y_i [M, N_i], S [M, sum of R_i]) for x [M, K].

    Args:
        x: shape [M, K].
        weights: every W_i, shape [N_i, K]; taken one after the other, and let go.
        biases, lora_as, lora_bs, scalings, dropouts, seeds: of every layer, as in reference.lora.lora_linear.
        drop: computes keep * x / (1 - p).
    """
    hidden = shrink(x, lora_as, dropouts, seeds, drop)
    parts = hidden.split([len(a) for a in lora_as], 1)
    # unlike a loop, map has let one weight go when it takes the next
    return list(map(functools.partial(lora.expand, x), weights, biases, parts, lora_bs, scalings)), hidden


def shrink(
    x: Tensor,
    lora_as: Sequence[Tensor],
    dropouts: Sequence[float],
    seeds: Sequence[Tensor | None],
    drop: Drop = drop,
) -> Tensor:
    """Return S [M, sum of R_i]; operands as in forward."""
    if not any(dropouts):
        return lora.shrink(x, torch.cat(tuple(lora_as)))
    each = zip(lora_as, dropouts, seeds, strict=True)
    return torch.cat([lora.shrink(x, a, p, seed, drop) for a, p, seed in each], 1)


def backward(
    d_ys: Sequence[Tensor],
    x: Tensor | None,
    weights: Iterable[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    hidden: Tensor,
    scalings: Sequence[float],
    dropouts: Sequence[float],
    seeds: Sequence[Tensor | None],
    need_x: bool,
    need_pairs: bool,
    drop: Drop = drop,
) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
    """Return (d_x, d_A [sum of R_i, K], every d_B_i), None and nothing where not needed.

    Args:
        d_ys: every G_i, shape [M, N_i].
        x: shape [M, K]; None will do if no pair needs a gradient.
        weights: as in forward; enter d_x only.
        lora_as, lora_bs, hidden, scalings, dropouts, seeds: as the forward had or made them.
        need_x: whether d_x is wanted.
        need_pairs: whether d_A and the d_B_i are.
        drop: as in forward.
    """
    lows = [g.to(b.dtype) for g, b in zip(d_ys, lora_bs, strict=True)]
    ranks = [len(a) for a in lora_as]
    scaled = list(zip(lows, lora_bs, hidden.split(ranks, 1), scalings, strict=True))
    d_s = torch.cat([(low @ b).mul_(scaling) for low, b, _, scaling in scaled], 1)
    parts = list(zip(d_s.split(ranks, 1), lora_as, dropouts, seeds, strict=True))
    d_x = d_lora_a = None
    d_lora_bs = []
    if need_pairs and x is not None:
        d_lora_bs = [(low.T @ s).mul_(scaling) for low, _, s, scaling in scaled]
        low_x = x.to(d_s.dtype)
        if any(dropouts):
            d_lora_a = torch.cat([part.T @ drop(low_x, p, seed) for part, _, p, seed in parts])
        else:
            d_lora_a = d_s.T @ low_x
    if need_x:
        each = iter(weights)
        for g in d_ys:
            d_x = g @ next(each) if d_x is None else d_x.addmm_(g, next(each))
    if d_x is not None:
        dtype = torch.promote_types(d_x.dtype, d_s.dtype)
        wide = d_x.to(dtype)
        if any(dropouts):
            for part, a, p, seed in parts:
                wide += drop(part @ a, p, seed)
        else:
            wide = wide.addmm_(d_s.to(dtype), torch.cat(tuple(lora_as)).to(dtype))
        d_x = wide.to(d_x.dtype)
    return d_x, d_lora_a, d_lora_bs
