"""Rounding bounds of the LoRA linear layer and its gradients, derived step by step from lora_core/reference/lora.py.

u and low are the unit roundoffs of the output's dtype and of A's; eta the spacing of A's subnormals. A sum of n
products in float32 errs by 2 u_32 sqrt(n) times the sum of magnitudes (tolerance.py). What is rounded on the way:
of the base product and the update with the bias the one that is made first, as a library adds the other to it in place;
S, dS, and D = drop(x) where p > 0.

A value v that is rounded errs by low |v|, whatever the magnitudes of what it is the sum of. The values of S then enter
y, those of dS dx and dA, and those of D S and dA, in sums over the ranks, the tokens and the columns; what the errors
of all come to there is said by tolerance.Roundings.through. It takes the roundings, or else the other factors, to have
signs independent of each other. So it is with random operands, with repeated rows or one element for all, and with
subnormals; it would not be where both factors repeat, as in dS^T x with a constant dL/dy and a constant x.
"""

from itertools import chain, permutations

import torch
from tolerance import UNIT_FP32, Roundings, assert_within_bound
from torch import Tensor

from lora_core.reference.dropout import keep_mask


def units(y: Tensor, lora_a: Tensor) -> tuple[float, float, float]:
    """Return u, low and eta."""
    info = torch.finfo(lora_a.dtype)
    return torch.finfo(y.dtype).eps / 2, info.eps / 2, info.smallest_normal * info.eps


def masked(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """D = drop(x) for x [..., K] in float64."""
    if p == 0:
        return x
    flat = x.reshape(-1, x.shape[-1])
    return torch.where(keep_mask(seed.cpu(), *flat.shape, p), flat / (1 - p), 0).view(x.shape)


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach().double().cpu() for t in tensors]


def check_forward(
    y, x, weight, bias, lora_a, lora_b, scaling, dropout=0.0, seed=None, hidden=None, rounded="base"
) -> None:
    """Fail unless y (and S, where given) are the layer's up to rounding.

    `rounded`: what is rounded before the sum is: the "base" product with the bias, and then the update, which the
    reference scales after its own rounding; the "update" with the bias; "either"; or "none", where all is one sum.
    """
    u, low, eta = units(y, lora_a)
    x, weight, bias, a, b = wide(x, weight, bias, lora_a, lora_b)
    bias = torch.zeros(weight.shape[0], dtype=torch.float64) if bias is None else bias
    d = masked(x, dropout, seed)
    base, s = x @ weight.T, d @ a.T
    update = scaling * s @ b.T + bias
    truth = base + update
    base_part, update_part, summed = u * (base + bias).abs(), u * update.abs(), low * truth.abs()
    parts = {
        "base": (base_part, summed),
        "update": (update_part,),
        "either": (torch.maximum(base_part, update_part), summed),
        "none": (),
    }
    columns, rank = x.shape[-1], a.shape[0]
    s_magnitude = d.abs() @ a.T.abs()
    s_bound = rounded_sum(s, low, eta, columns, s_magnitude)
    if dropout > 0:
        s_bound += Roundings.of(low * d.abs()).through(a.T)
    magnitude = x.abs() @ weight.T.abs() + bias.abs() + abs(scaling) * s_magnitude @ b.T.abs()
    # a library may multiply B by the scaling first, which costs a subnormal one of its last bits
    scaled = eta * s.abs().sum(-1, keepdim=True)
    alike = bool((x == x[..., :1]).all() and (weight == weight[:, :1]).all())
    own = Roundings.of(u * truth.abs(), *parts[rounded], scaled + sums(columns + rank + 2, magnitude, alike))
    bound = own + s_bound.through(scaling * b.T)
    assert_within_bound(y.cpu(), truth, bound)
    if hidden is not None:
        assert_within_bound(hidden.cpu().view(s.shape), s, s_bound)


def sums(terms: int, magnitude: Tensor, alike: bool = False) -> Tensor:
    """Return what a float32 sum of so many products is off; one below the normal numbers errs as the smallest does.

    Where all are alike, a sum may be rounded the same way again and again, each time by u_32 of what it has grown to:
    all in all by half of u_32 terms.
    """
    roundings = max(2 * terms**0.5, terms / 2 if alike else 0.0)
    return UNIT_FP32 * roundings * (magnitude + torch.finfo(torch.float32).smallest_normal)


def rounded_sum(value: Tensor, low: float, eta: float, terms: int, magnitude: Tensor) -> Roundings:
    """Return what a value is off that is such a sum, rounded to a unit of low and a spacing of eta."""
    return Roundings.of(low * value.abs() + eta / 2, sums(terms, magnitude))


GRADIENTS = ("d_x", "d_weight", "d_bias", "d_lora_a", "d_lora_b")


def check_backward(grads, d_y, x, weight, lora_a, lora_b, hidden, scaling, dropout=0.0, seed=None) -> None:
    """Fail unless grads (d_x, d_weight, d_bias, d_lora_a, d_lora_b), some None, are right up to rounding.

    All of shape [rows, columns]; hidden as the forward made it.
    """
    found = backward_bounds(d_y, x, weight, lora_a, lora_b, hidden, scaling, dropout, seed)
    for name, got in zip(GRADIENTS, grads, strict=True):
        truth, bound = found[name]
        if got is not None:
            assert_within_bound(got.cpu(), truth, bound)


def check_backward_of_several(d_x, pairs, d_ys, layers, x) -> None:
    """Fail unless d_x, the sum of several layers', and their pairs' gradients are right up to rounding.

    Args:
        d_x: shape [rows, K], or None.
        pairs: (d_lora_a, d_lora_b) of every layer, or none.
        d_ys: gradient of every output.
        layers: (weight, lora_a, lora_b, hidden, scaling, dropout, seed) of every layer.
        x: shape [rows, K].
    """
    found = [backward_bounds(g, x, *layer) for g, layer in zip(d_ys, layers, strict=True)]
    for (d_a, d_b), own in zip(pairs, found, strict=bool(pairs)):
        assert_within_bound(d_a.cpu(), *own["d_lora_a"])
        assert_within_bound(d_b.cpu(), *own["d_lora_b"])
    if d_x is not None:
        bases, low_ranks, within = ([own[name] for own in found] for name in ("base", "low rank", "within d_x"))
        truth = sum(bases) + sum(low_ranks)
        if any(dropout for *_, dropout, _ in layers):
            # the low-rank parts have masks of their own: added last, or each with its layer
            by_layer = [[*chain(*zip(*both, strict=True))] for both in permutations([bases, low_ranks])]
            orders = [[*bases, *low_ranks], *by_layer]
        else:
            orders = [[*bases, sum(low_ranks)], [sum(low_ranks), *bases]]
        assert_within_bound(d_x.cpu(), truth, sum(within, start=added(orders, d_x, layers[0][1])))


def added(orders: list[list[Tensor]], like: Tensor, lora_a: Tensor) -> Roundings:
    """Return what a sum errs by that is rounded to the dtype of `like` as each part is added, in one of these orders.

    The whole sum may have been rounded to A's dtype before.
    """
    u, low, _ = units(like, lora_a)
    partial = torch.stack([torch.stack(parts).cumsum(0).abs() for parts in orders]).amax(0)
    return Roundings.of(*(u * partial), low * partial[-1])


def backward_bounds(d_y, x, weight, lora_a, lora_b, hidden, scaling, dropout=0.0, seed=None) -> dict:
    """Return (truth, bound) of each gradient by name; of d_x its parts, too, and what is rounded within them."""
    _, low, eta = units(d_y, lora_a)
    g, x, weight, a, b, s = wide(d_y, x, weight, lora_a, lora_b, hidden)
    rows, columns, rank = g.shape[0], g.shape[1], a.shape[0]
    factor, d = abs(scaling), masked(x, dropout, seed)
    product, product_magnitude = g @ b, g.abs() @ b.abs()
    d_s, d_s_magnitude = scaling * product, factor * product_magnitude
    # the product is rounded before it is scaled, and again then
    d_s_bound = rounded_sum(product, low, eta, columns, product_magnitude) * scaling
    d_s_bound += Roundings.of(low * d_s.abs() + eta / 2)
    mask = masked(torch.ones_like(x), dropout, seed)
    low_rank = mask * (d_s @ a)
    base = g @ weight
    magnitudes = {
        "d_x": g.abs() @ weight.abs() + mask * (d_s_magnitude @ a.abs()),
        "d_weight": g.T.abs() @ x.abs(),
        "d_bias": g.abs().sum(0),
        "d_lora_a": d_s_magnitude.T @ d.abs(),
        "d_lora_b": factor * g.T.abs() @ s.abs(),
    }
    truths = {
        "d_x": base + low_rank,
        "d_weight": g.T @ x,
        "d_bias": g.sum(0),
        "d_lora_a": d_s.T @ d,
        "d_lora_b": scaling * g.T @ s,
    }
    # rounded on the way: the low-rank part by itself; 1 / (1 - p) is one more rounding
    carried = {"d_x": Roundings.of(low * low_rank.abs()) + d_s_bound.through(a) * mask}
    carried["d_lora_a"] = d_s_bound.T.through(d)
    if dropout > 0:
        carried["d_lora_a"] += Roundings.of(low * d.abs()).T.through(d_s).T
    lengths = {"d_x": columns + rank, "d_weight": rows, "d_bias": rows, "d_lora_a": rows, "d_lora_b": rows}
    own = {"d_x": d_y, "d_weight": d_y, "d_bias": d_y, "d_lora_a": lora_a, "d_lora_b": lora_b}
    within = {name: Roundings.of(sums(lengths[name] + 1, magnitudes[name])) for name in GRADIENTS}
    within |= {name: within[name] + more for name, more in carried.items()}
    found = {"base": base, "low rank": low_rank, "within d_x": within["d_x"]}
    for name, truth in truths.items():
        once = torch.finfo(own[name].dtype).eps / 2 * truth.abs()
        # scaling is multiplied in after the sum is rounded, in the reference
        rounded = Roundings.of(*[once] * (2 if name == "d_lora_b" else 1))
        if name == "d_x":
            rounded = added([[base, low_rank], [low_rank, base]], d_y, lora_a)
        found[name] = (truth, within[name] + rounded)
    return found
