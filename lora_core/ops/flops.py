"""How many operations what multiplies matrices makes, for torch.utils.flop_counter: a product of m x k x n is 2mkn.

Import this module before a FlopCounterMode is made, which counts nothing of what it does not know. lora_core itself
does not import it: PyTorch's counter imports Triton. grouped_lora is not counted: its work depends on which rows have
an adapter. Of causal attention what tokens see is counted.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

# importing them makes torch.ops know them
from lora_core.ops import causal_attention, lora_linear, lora_linears, nf4_lora_linear  # noqa: F401

Shape = Sequence[int]


def _forward(x: Shape, n: int, lora_a: Shape) -> int:
    """Return those of x W^T, S = x A^T and S B^T."""
    r, k = lora_a
    return 2 * math.prod(x[:-1]) * (n * k + r * k + n * r)


def _backward(d_y: Shape, lora_a: Shape, need_x: bool, need_weight: bool, need_a: bool, need_b: bool) -> int:
    """Return those of dS, and of what is needed of dx, which takes two products, dW, dA and dB."""
    (r, k), n = lora_a, d_y[-1]
    terms = (need_x or need_a) * n * r + need_x * (n * k + r * k) + need_weight * n * k + need_a * r * k
    return 2 * math.prod(d_y[:-1]) * (terms + need_b * n * r)


@register_flop_formula(torch.ops.lora_core.lora_linear)
def _(x: Shape, weight: Shape, bias: Any, lora_a: Shape, *rest: Any, **out: Any) -> int:
    return _forward(x, weight[0], lora_a)


@register_flop_formula(torch.ops.lora_core.lora_linear_backward)
def _(d_y: Shape, x: Any, weight: Any, lora_a: Shape, *rest: Any, **out: Any) -> int:
    need_x, need_weight, _, need_a, need_b = rest[-1]
    return _backward(d_y, lora_a, need_x, need_weight, need_a, need_b)


@register_flop_formula(torch.ops.lora_core.nf4_lora_linear)
def _(x: Shape, *rest: Any, **out: Any) -> int:
    shape, lora_a = rest[4], rest[8]
    return _forward(x, shape[0], lora_a)


@register_flop_formula(torch.ops.lora_core.nf4_lora_linear_backward)
def _(d_y: Shape, *rest: Any, **out: Any) -> int:
    need_x, _, need_a, need_b = rest[-1]
    return _backward(d_y, rest[8], need_x, False, need_a, need_b)


@register_flop_formula(torch.ops.lora_core.lora_linears)
def _(
    x: Shape,
    tensors: Any,
    formats: Any,
    biases: Any,
    lora_as: Sequence[Shape],
    lora_bs: Sequence[Shape],
    *_: Any,
    **out: Any,
) -> int:
    return sum(_forward(x, b[0], a) for a, b in zip(lora_as, lora_bs, strict=True))


@register_flop_formula(torch.ops.lora_core.lora_linears_backward)
def _(
    d_ys: Sequence[Shape], x: Any, tensors: Any, formats: Any, lora_as: Sequence[Shape], *rest: Any, **out: Any
) -> int:
    need_x, need_pairs = rest[-2:]
    each = zip(d_ys, lora_as, strict=True)
    return sum(_backward(d_y, a, need_x, False, need_pairs, need_pairs) for d_y, a in each)


@register_flop_formula(torch.ops.lora_core.causal_attention)
def _(q: Shape, k: Any, v: Shape, *rest: Any, **out: Any) -> int:
    return _seen(q) * (q[-1] + v[-1])


@register_flop_formula(torch.ops.lora_core.causal_attention_backward)
def _(d_o: Any, q: Shape, k: Any, v: Shape, *rest: Any, **out: Any) -> int:
    # scores once more, dQ and dK; dP and dV
    return _seen(q) * (3 * q[-1] + 2 * v[-1])


def _seen(q: Shape) -> int:
    """Return twice as many as there are pairs of a query and a key that it sees."""
    b, h, t, _ = q
    return b * h * t * (t + 1)
