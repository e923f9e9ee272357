"""lora_core::lora_linears on the CPU: the reference's formulas with the faster library's products."""

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lora_core.cpu.dropout import dropped, one_mask_each
from lora_core.cpu.low_rank import a_gradient, add_low_rank, b_gradient, expand, hidden_gradient, runs_here, shrink
from lora_core.cpu.product import add_product, product
from lora_core.ops import lora_linears as ops
from lora_core.ops.eager import register
from lora_core.ops.packed import dense, unflatten
from lora_core.reference import lora_linears as reference
from lora_core.reference.dropout import Drop


def lora_linears(
    x: Tensor,
    tensors: Sequence[Tensor],
    formats: Sequence[int],
    biases: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scalings: Sequence[float],
    dropouts: Sequence[float],
    seeds: Sequence[Tensor],
) -> list[Tensor]:
    """Return what the reference returns, up to rounding."""
    forward = _forward if runs_here(x, lora_as[0]) else functools.partial(reference.forward, drop=dropped)
    weights = (dense(w, x.dtype) for w in unflatten(tensors, formats))
    flat = x.reshape(-1, x.shape[-1])
    given = ops.empty_to_none
    ys, hidden = forward(flat, weights, given(biases), lora_as, lora_bs, scalings, dropouts, given(seeds))
    return [*(y.view(*x.shape[:-1], y.shape[1]) for y in ys), hidden]


def lora_linears_backward(
    d_ys: Sequence[Tensor],
    x: Tensor | None,
    tensors: Sequence[Tensor],
    formats: Sequence[int],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    hidden: Tensor,
    scalings: Sequence[float],
    dropouts: Sequence[float],
    seeds: Sequence[Tensor],
    need_x: bool,
    need_pairs: bool,
) -> Sequence[Tensor | None]:
    """Return what the reference returns, up to rounding."""
    adapters = (lora_as, lora_bs, hidden, scalings, dropouts)
    backward = _backward if runs_here(d_ys[0], lora_as[0]) else reference.backward
    weights = (dense(w, d_ys[0].dtype) for w in unflatten(tensors, formats))
    flat = None if x is None else x.reshape(-1, x.shape[-1])
    rows = [g.reshape(-1, g.shape[-1]) for g in d_ys]
    rest = (ops.empty_to_none(seeds), need_x, need_pairs, one_mask_each())
    d_x, d_lora_a, d_lora_bs = backward(rows, flat, weights, *adapters, *rest)
    d_x = None if d_x is None else d_x.view(*d_ys[0].shape[:-1], d_x.shape[1])
    return [d_x, d_lora_a, *d_lora_bs]


def _forward(
    x: Tensor,
    weights: Iterable[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scalings: Sequence[float],
    dropouts: Sequence[float],
    seeds: Sequence[Tensor | None],
) -> tuple[list[Tensor], Tensor]:
    """Return (every y_i, S); arguments as in reference.lora_linears.forward."""
    if any(dropouts):
        hidden = torch.cat([shrink(x, *each) for each in zip(lora_as, dropouts, seeds, strict=True)], 1)
    else:
        hidden = shrink(x, torch.cat(tuple(lora_as)))
    parts = hidden.split([len(a) for a in lora_as], 1)
    # unlike a loop, map has let one weight go when it takes the next
    return list(map(functools.partial(expand, x), weights, biases, parts, lora_bs, scalings)), hidden


def _backward(
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
    drop: Drop = dropped,
) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
    """Return (d_x, d_A, every d_B_i); arguments as in reference.lora_linears.backward."""
    parts = [hidden_gradient(*each) for each in zip(d_ys, lora_bs, scalings, strict=True)]
    d_s, masks = torch.cat(parts, 1), [(p, seed, drop) for p, seed in zip(dropouts, seeds, strict=True)]
    d_x = d_lora_a = None
    d_lora_bs = []
    if need_pairs and x is not None:
        columns = hidden.split([len(a) for a in lora_as], 1)
        d_lora_bs = [b_gradient(*each) for each in zip(d_ys, columns, scalings, strict=True)]
        if any(dropouts):
            d_lora_a = torch.cat([a_gradient(d, x, *mask) for d, mask in zip(parts, masks, strict=True)])
        else:
            d_lora_a = a_gradient(d_s, x)
    if need_x:
        each = iter(weights)
        for g in d_ys:
            d_x = product(g, next(each).T) if d_x is None else add_product(d_x, g, next(each).T)
    if d_x is not None:
        if any(dropouts):
            for d, a, mask in zip(parts, lora_as, masks, strict=True):
                add_low_rank(d_x, d, a, *mask)
        else:
            add_low_rank(d_x, d_s, torch.cat(tuple(lora_as)))
    return d_x, d_lora_a, d_lora_bs


register(ops.op, "cpu", lora_linears)
register(ops.backward_op, "cpu", lora_linears_backward)
