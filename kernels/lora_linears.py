"""Triton kernels for lora_core::lora_linears and its backward: several LoRA linear layers of one x.

    S = x A^T, A = all A_i on top of each other        shrink.py, one read of x
    y_i from x, W_i, S_i, B_i                          as lora_linear.py and nf4_lora_linear.py make them
    dS_i = s_i G_i B_i, dB_i                           row_sum.py
    dA = dS^T x, all A_i at once                       row_sum.py, one read of x
    dx = sum G_i W_i + dS A                            each product added to the last; dS A goes with the first

With dropout, whose masks differ, x is read once for each layer. What is out of
reach (reach.py) takes the reference.

Reference: lora_core/reference/lora_linears.py
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lora_core.kernels.log import log
from lora_core.kernels.low_rank import a_gradient, low_rank_gradients, low_rank_linear, path_of, skinny_product
from lora_core.kernels.nf4_lora_linear import packed_input_gradient, packed_low_rank_linear
from lora_core.kernels.reach import left_to_reference, near
from lora_core.ops.eager import register
from lora_core.ops.lora_linears import backward, backward_op, empty_to_none, forward, op
from lora_core.ops.packed import Packed, unflatten


@near
def launch_lora_linears(
    x: Tensor,
    tensors: Sequence[Tensor],
    formats: Sequence[int],
    biases: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scalings: Sequence[float],
    dropouts: Sequence[float],
    seeds: Sequence[Tensor],
    path: str | None = None,
) -> list[Tensor]:
    """Run the forward; operands as checked by the op. Copies x only where its leading dimensions cannot be flattened.

    Args:
        path: "fused" or "library"; by default what was measured to be faster.
    Returns:
        Every y_i [..., N_i], then S [M, sum of R_i].
    """
    flat, ranks = x.reshape(-1, x.shape[-1]), [len(a) for a in lora_as]
    if left_to_reference("lora_linears", flat, *_dense(tensors, formats), *lora_as, *lora_bs, sides=(sum(ranks),)):
        return forward(x, tensors, formats, biases, lora_as, lora_bs, scalings, dropouts, seeds)
    paths = [path or path_of(flat, (len(b), x.shape[-1]), len(a)) for a, b in zip(lora_as, lora_bs, strict=True)]
    if any(dropouts):
        each = zip(lora_as, dropouts, seeds, strict=True)
        parts = [skinny_product(flat, a, paths[0], p, seed) for a, p, seed in each]
        hidden = torch.cat(parts, 1)
    else:
        hidden = skinny_product(flat, torch.cat(tuple(lora_as)), paths[0])
        parts = list(hidden.split(ranks, 1))
    log.debug("linears: %d layers, ranks %s", len(lora_as), ranks)
    ys = []
    layers = zip(unflatten(tensors, formats), empty_to_none(biases), parts, lora_bs, scalings, paths, strict=True)
    for w, bias, s, b, scaling, own_path in layers:
        if isinstance(w, Packed):
            y = packed_low_rank_linear(flat, w, bias, s, b, scaling, own_path)
        else:
            y = low_rank_linear(flat, w, bias, s, b, scaling, path=own_path)
        ys.append(y.view(*x.shape[:-1], y.shape[1]))
    return [*ys, hidden]


@near
def launch_lora_linears_backward(
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
    path: str | None = None,
) -> Sequence[Tensor | None]:
    """Run the backward; operands and results as the op has them, None or left out where none is wanted.

    Args:
        path: "fused" or "library"; by default what was measured to be faster.
    """
    lead = d_ys[0].shape[:-1]
    adapter = (lora_as, lora_bs, hidden, scalings, dropouts, seeds)
    grads = [g.reshape(-1, g.shape[-1]) for g in d_ys]
    flat = None if x is None else x.reshape(-1, x.shape[-1])
    matrices = (*_dense(tensors, formats), *lora_as, *lora_bs)
    if left_to_reference("lora_linears_backward", grads[0], *matrices, sides=hidden.shape[1:]):
        return backward(d_ys, x, tensors, formats, *adapter, need_x, need_pairs)
    masked = any(dropouts)
    # dA of all layers at once, below, unless their masks differ
    own_x = flat if masked else None
    needs = (need_x, False, need_pairs, need_pairs)
    width = lora_as[0].shape[1]
    paths = [path or path_of(g, (width, g.shape[1]), len(a)) for g, a in zip(grads, lora_as, strict=True)]
    found = [
        low_rank_gradients(g, own_x, a, b, s, scaling, p, seed, needs, own_path)
        for g, s, own_path, (a, b, scaling, p, seed) in zip(
            grads,
            hidden.split([len(a) for a in lora_as], 1),
            paths,
            zip(lora_as, lora_bs, scalings, dropouts, seeds, strict=True),
            strict=True,
        )
    ]
    d_ss = [d_s for d_s, *_ in found if d_s is not None]
    d_x = d_lora_a = None
    d_lora_bs: list[Tensor] = []
    if need_pairs and flat is not None:
        d_lora_bs = [d_b for *_, d_b in found if d_b is not None]
        if masked:
            d_lora_a = torch.cat([d_a for _, _, d_a, _ in found if d_a is not None])
        else:
            d_lora_a = a_gradient(flat, torch.cat(d_ss, 1), paths[0])
    if need_x:
        ups: list[tuple[Tensor, Tensor, float, Tensor | None]] = list(zip(d_ss, lora_as, dropouts, seeds, strict=True))
        if not masked:
            together = (torch.cat(d_ss, 1), torch.cat(tuple(lora_as)), 0.0, None)
            ups = [together, *((d_s[:, :0], a[:0], 0.0, None) for d_s, a, *_ in ups[1:])]
        total = _input_gradient(grads, unflatten(tensors, formats), ups, path)
        d_x = None if total is None else total.view(*lead, lora_as[0].shape[1])
    return [d_x, d_lora_a, *d_lora_bs]


def _dense(tensors: Sequence[Tensor], formats: Sequence[int]) -> list[Tensor]:
    """Return the weights that are not packed."""
    return [w for w in unflatten(tensors, formats) if isinstance(w, Tensor)]


def _input_gradient(
    d_ys: Iterable[Tensor],
    weights: Iterable[Tensor | Packed],
    ups: Iterable[tuple[Tensor, Tensor, float, Tensor | None]],
    path: str | None,
) -> Tensor | None:
    """Return the sum over the layers of G W + keep (dS A) / (1 - p), of ups = (dS, A, p, seed)."""
    d_x = None
    for g, w, (d_s, a, p, seed) in zip(d_ys, weights, ups, strict=True):
        if isinstance(w, Packed):
            d_x = packed_input_gradient(g, w, d_s, a, p, seed, path, d_x)
        else:
            d_x = low_rank_linear(g, w.T, None, d_s, a.T, 1 / (1 - p), p, seed, path, d_x)
    return d_x


register(op, "cuda", launch_lora_linears)
register(backward_op, "cuda", launch_lora_linears_backward)
