"""Causal attention, forward and backward, in plain PyTorch.

Forward, for a head with queries Q and keys K [T, D] and values V [T, E], and a scale s; query t sees the keys 0 to t:

    S = s Q K^T, where seen        P = softmax of S by row, 0 where not seen        O = P V

Backward, with dO = dL/dO. A row p of P is exp(S) / sum(exp(S)) of the row of S, so dp = p (dS - <p, dS>), and

    dL = <dO, P dV>        gives   dV = P^T dO
    dL = <dO, dP V>        gives   dP = dO V^T
    dL = <dP, p (dS - <p, dS>)>,   row by row, gives   dS = P (dP - <p, dP>)
    S = s Q K^T            gives   dQ = s dS K        dK = s dS^T Q

where P times what follows is meant element by element in dS. H query heads may share G key heads, H / G neighbours one
of them; the gradient of what is shared is the sum over those that share it. Their queries are rows of one matrix here,
[H / G T, D], so that the products with P^T and dS^T take that sum.

All that is kept between the passes is Q, K and V: the backward makes P anew. Here P and dP are whole matrices, T^2
numbers a query head each, where a fast path needs no more of them at a time than some rows. What is not seen is
multiplied by 0, so that a value that is no finite number may reach earlier tokens, as it may in PyTorch. Computed in
float32, or in float64 where the operands are, and rounded once.

Source: Vaswani et al. 2017 (arXiv 1706.03762), eq. 1, with a mask; Ainslie et al. 2023 (arXiv 2305.13245), section 2.2,
for heads that share keys; Dao et al. 2022 (arXiv 2205.14135), section 3.1, for a softmax that is made anew.
"""

import torch
from torch import Tensor

# of a probability, beside those of its score: its exponential's, its sum's, the quotient's
ROUNDINGS = 10


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return softmax(scale q k^T, of what comes no later) v, head by head.

    Args:
        q: floating, shape [B, H, T, D].
        k: dtype of q, shape [B, G, T, D], H a multiple of G: query head h takes key head h // (H / G).
        v: dtype of q, shape [B, G, T, E].
        scale: what products of queries and keys are multiplied by.
    Returns:
        Shape [B, H, T, E], dtype of q, token by token, as a projection reads it: its transpose(1, 2) is contiguous.
    """
    p = _softmax(_by_key_head(q, k), _wide(k), scale)
    return _by_token(p @ _wide(v), q, v.shape[-1])


def backward(d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return dL/dq, dL/dk and dL/dv for d_o = dL/do, token by token, as projections wrote q, k and v.

    Args:
        d_o: shape [B, H, T, E], dtype of q.
        q, k, v, scale: as the forward takes them.
    """
    rows, grads, keys, values = _by_key_head(q, k), _by_key_head(d_o, k), _wide(k), _wide(v)
    p = _softmax(rows, keys, scale)
    d_v = p.mT @ grads
    d_p = grads @ values.mT
    d_s = p * (d_p - (p * d_p).sum(-1, keepdim=True))
    d_q, d_k = scale * (d_s @ keys), scale * (d_s.mT @ rows)
    return _by_token(d_q, q, q.shape[-1]), _by_token(d_k, k, k.shape[-1]), _by_token(d_v, v, v.shape[-1])


def magnitudes(d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what the rounding errors of o, dL/dq, dL/dk and dL/dv are shares of: the formula on absolute values.

    A probability stands in it as often as its score, which is rounded as the products that it is a sum of, its
    distance to the largest, and what is made of it may each add a rounding of it. Arguments are those of backward.
    """
    rows, grads, keys, values = _by_key_head(q, k), _by_key_head(d_o, k), _wide(k), _wide(v)
    p, scores = _softmax(rows, keys, scale), scale * (rows @ keys.mT)
    least = scores.masked_fill(p == 0, -torch.inf).amax(-1, keepdim=True) - scores
    products = abs(scale) * (rows.abs() @ keys.abs().mT)
    p_off = p * (2 * q.shape[-1] ** 0.5 * products + 3 * least + ROUNDINGS)
    d_p, most = grads @ values.mT, grads.abs() @ values.abs().mT
    d_s = abs(scale) * (
        p_off * (d_p - (p * d_p).sum(-1, keepdim=True)).abs()
        + p * (v.shape[-1] ** 0.5 * most + (p_off * most).sum(-1, keepdim=True))
    )
    found = (
        (p_off @ values.abs(), q, v),
        (d_s @ keys.abs(), q, q),
        (d_s.mT @ rows.abs(), k, k),
        (p_off.mT @ grads.abs(), v, v),
    )
    of_o, of_q, of_k, of_v = (_by_token(t, like, size.shape[-1]) for t, like, size in found)
    return of_o, of_q, of_k, of_v


def _softmax(rows: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Return P [B, G, H / G T, T] of queries [B, G, H / G T, D] and keys [B, G, T, D]."""
    tokens = torch.arange(keys.shape[2], device=keys.device)
    of_row = tokens.repeat(rows.shape[2] // max(keys.shape[2], 1))
    return (scale * (rows @ keys.mT)).masked_fill(tokens > of_row[:, None], -torch.inf).softmax(-1)


def _by_key_head(t: Tensor, k: Tensor) -> Tensor:
    """Return t [B, H, T, N] as [B, G, H / G T, N]: the rows of all heads that share a key head, one after another."""
    b, h, tokens, size = t.shape
    return _wide(t).reshape(b, k.shape[1], h // k.shape[1] * tokens, size)


def _by_token(t: Tensor, like: Tensor, size: int) -> Tensor:
    """Return t with the first three dimensions and the dtype of `like`, its memory token by token."""
    return t.reshape(*like.shape[:3], size).to(like.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
