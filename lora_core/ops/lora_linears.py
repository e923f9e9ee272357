"""The operations lora_core::lora_linears and its backward: several frozen layers, dense or NF4, that read one x.

The mathematics stands in lora_core/reference/lora_linears.py.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_core.errors import ConfigError, DtypeError
from lora_core.ops.checks import (
    autocast_dtype,
    check_devices,
    check_dropout,
    check_dtypes,
    check_kinds,
    check_shapes,
    check_sides,
    check_tensors,
    outside_autocast,
    refuse_tangents,
)
from lora_core.ops.eager import call, differentiable, none_to_empty
from lora_core.ops.packed import Packed, dense, flatten, unflatten
from lora_core.reference import lora_linears as reference


class Layer(NamedTuple):
    """One of the layers.

    Args:
        weight: W, frozen: dtype of x, shape [N, K], or the parts of an NF4 weight of that shape.
        bias: b, frozen: dtype of x, shape [N], or None.
        lora_a: A, dtype of x or float32, shape [R, K].
        lora_b: B, dtype of lora_a, shape [N, R].
        scaling: s, alpha / r.
        dropout: probability of zeroing an element of x before A, in [0, 1).
        seed: int64 tensor of one element, which fixes the mask; needed where dropout > 0.
    """

    weight: Tensor | Packed
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    dropout: float = 0.0
    seed: Tensor | None = None


def forward(
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
    """Return every y_i, then S, by the reference."""
    weights = _dense(tensors, formats, x.dtype)
    flat = x.reshape(-1, x.shape[-1])
    ys, hidden = reference.forward(
        flat, weights, empty_to_none(biases), lora_as, lora_bs, scalings, dropouts, empty_to_none(seeds)
    )
    return [*(y.view(*x.shape[:-1], y.shape[1]) for y in ys), hidden]


op = torch.library.custom_op("lora_core::lora_linears", forward, mutates_args=())


@op.register_fake
def _(
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
    ranks = sum(a.shape[0] for a in lora_as)
    ys = (x.new_empty(*x.shape[:-1], b.shape[0]) for b in lora_bs)
    return [*ys, lora_as[0].new_empty(math.prod(x.shape[:-1]), ranks)]


def backward(
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
) -> list[Tensor]:
    """Return d_x, d_A of all layers and every d_B_i, by the reference; empty or left out where not needed."""
    flat = None if x is None else x.reshape(-1, x.shape[-1])
    rows = [g.reshape(-1, g.shape[-1]) for g in d_ys]
    weights = _dense(tensors, formats, d_ys[0].dtype)
    d_x, d_lora_a, d_lora_bs = reference.backward(
        rows, flat, weights, lora_as, lora_bs, hidden, scalings, dropouts, empty_to_none(seeds), need_x, need_pairs
    )
    d_x = None if d_x is None else d_x.view(*d_ys[0].shape[:-1], d_x.shape[1])
    grads: list[Tensor] = none_to_empty(d_ys[0], [d_x, d_lora_a, *d_lora_bs])
    return grads


backward_op = torch.library.custom_op("lora_core::lora_linears_backward", backward, mutates_args=())


@backward_op.register_fake
def _(
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
) -> list[Tensor]:
    empty, columns = d_ys[0].new_empty, lora_as[0].shape[1]
    d_x = empty(*d_ys[0].shape[:-1], columns) if need_x else empty(0)
    if not need_pairs:
        return [d_x, empty(0)]
    return [d_x, lora_as[0].new_empty(hidden.shape[1], columns), *(b.new_empty(b.shape) for b in lora_bs)]


def empty_to_none(tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """Return None for each empty tensor: in the schema it stands for no bias, and for no seed."""
    return [t if t.numel() else None for t in tensors]


def _dense(tensors: Sequence[Tensor], formats: Sequence[int], dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield dense weights, one alive at a time."""
    return (dense(w, dtype) for w in unflatten(tensors, formats))


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, tensors, ctx.formats, _, lora_as, lora_bs, ctx.scalings, ctx.dropouts, seeds = inputs
    ctx.mark_non_differentiable(output[-1])
    ctx.set_materialize_grads(False)
    ctx.count, ctx.parts = len(lora_as), len(tensors)
    ctx.need_x = ctx.needs_input_grad[0]
    ctx.need_pairs = any(t.requires_grad for t in (*lora_as, *lora_bs))
    kept = x if ctx.need_pairs else None
    # weights enter the gradient of x alone
    ctx.save_for_backward(kept, output[-1], *lora_as, *lora_bs, *seeds, *(tensors if ctx.need_x else ()))


def _backward(ctx, grads):  # type: ignore[no-untyped-def]
    x, hidden, *rest = _saved(ctx)
    n = ctx.count
    lora_as, lora_bs, seeds, tensors = rest[:n], rest[n : 2 * n], rest[2 * n : 3 * n], rest[3 * n :]
    ranks = [len(a) for a in lora_as]
    # an output that the loss does not depend on leaves its layer without a gradient, as if it had been called alone
    used = [i for i in range(n) if grads[i] is not None]
    d_lora_as, d_lora_bs = [None] * n, [None] * n
    d_x = None
    if used:
        weights = list(unflatten(tensors, ctx.formats)) if ctx.need_x else []
        packed = flatten([weights[i] for i in used] if weights else [])
        if len(used) < n:
            hidden = torch.cat([part for i, part in enumerate(hidden.split(ranks, 1)) if i in used], 1)
        d_ys, *adapter = ([of[i] for i in used] for of in (grads, lora_as, lora_bs, ctx.scalings, ctx.dropouts, seeds))
        needs = (ctx.need_x, ctx.need_pairs)
        found = call(backward_op, d_ys, x, *packed, *adapter[:2], hidden, *adapter[2:], *needs)
        d_x = found[0] if ctx.need_x else None
        if ctx.need_pairs:
            for i, d_a, d_b in zip(used, found[1].split([ranks[i] for i in used]), found[2:], strict=True):
                d_lora_as[i], d_lora_bs[i] = d_a, d_b
    return d_x, [None] * ctx.parts, None, [None] * n, d_lora_as, d_lora_bs, None, None, [None] * n


def _saved(ctx) -> Sequence[Tensor | None]:  # type: ignore[no-untyped-def]
    try:
        saved: Sequence[Tensor | None] = ctx.saved_tensors
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise RuntimeError(
            f"{error} Layers that read one x together have one backward: make it once for the sum of their losses, "
            "give retain_graph=True to all but the last, or let each be on its own by fuse(model, share=False)."
        ) from None
    return saved


_run = differentiable(op, _save, _backward)


def lora_linears(x: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
    """Return x W^T + b + s (drop(x) A^T) B^T for each layer, reading x once for all low-rank paths.

    Differentiable in x and in every A and B; not twice. With dropout each layer draws a mask of its own, and x is read
    once for each. Under autocast all operands are cast, as by torch.nn.functional.linear.

    Args:
        x: float32, float16, bfloat16 or float64 of shape [..., K], any strides.
        layers: at least one; A and B of all of them in one dtype.
    Returns:
        One tensor for each layer, shape [..., N], dtype of x.
    Raises:
        ShapeError, DtypeError, DeviceError: if the operands do not fit together.
        ConfigError: if there is no layer, a weight or bias is being trained, or dropout is no probability or has no
            seed.
    Source: Hu et al. 2021, eq. 3.
    """
    check_tensors("lora_linears", {"x": x})
    if not layers:
        raise ConfigError("lora_linears: layers is empty: want at least one")
    layers = [_sound(f"lora_linears, layer {i}", layer) for i, layer in enumerate(layers)]
    cast = autocast_dtype(x)
    if cast is not None:
        x = x.to(cast)
        layers = [_cast(layer, cast) for layer in layers]
    for i, layer in enumerate(layers):
        _check(f"lora_linears, layer {i}", x, layer)
    lows = {layer.lora_a.dtype for layer in layers}
    if len(lows) > 1:
        raise DtypeError(
            f"lora_linears: want lora_a and lora_b of all layers in one dtype; got {sorted(map(str, lows))}: "
            "call lora_linear for each"
        )
    weights, biases, lora_as, lora_bs, scalings, dropouts, seeds = map(list, zip(*layers, strict=True))
    none = x.new_empty(0)
    tensors, formats = flatten(weights)
    seeds = [x.new_empty(0, dtype=torch.int64) if s is None else s for s in seeds]
    biases = [none if b is None else b for b in biases]
    with outside_autocast(x):
        return list(_run(x, tensors, formats, biases, lora_as, lora_bs, scalings, dropouts, seeds)[:-1])


def _sound(name: str, layer: Layer) -> Layer:
    """Return the layer with its numbers as floats; raise unless all in it is of the right kind."""
    if not isinstance(layer, Layer):
        raise ConfigError(f"{name} is a {type(layer).__name__}; want a lora_linears.Layer")
    if not isinstance(layer.weight, (Tensor, Packed)):
        raise DtypeError(f"{name}: weight is a {type(layer.weight).__name__}; want a torch.Tensor, or Packed.of(q)")
    tensors: dict[str, object] = {"lora_a": layer.lora_a, "lora_b": layer.lora_b}
    scaling = check_kinds(name, tensors, layer.bias, layer.scaling)
    return layer._replace(scaling=scaling, dropout=check_dropout(name, layer.dropout, layer.seed))


def _cast(layer: Layer, dtype: torch.dtype) -> Layer:
    return layer._replace(
        weight=layer.weight.to(dtype) if isinstance(layer.weight, Tensor) else layer.weight,
        bias=None if layer.bias is None else layer.bias.to(dtype),
        lora_a=layer.lora_a.to(dtype),
        lora_b=layer.lora_b.to(dtype),
    )


def _check(name: str, x: Tensor, layer: Layer) -> None:
    w, bias, lora_a, lora_b, _, dropout, seed = layer
    on_device = w if isinstance(w, Tensor) else w.codes
    compute = {"x": x, "weight": w, "bias": bias} if isinstance(w, Tensor) else {"x": x, "bias": bias}
    check_shapes(name, x, tuple(w.shape), bias, lora_a, lora_b)
    check_sides(name, tuple(w.shape))
    check_dtypes(name, compute, lora_a, lora_b)
    tensors = {"x": x, "weight": on_device, "bias": bias, "lora_a": lora_a, "lora_b": lora_b}
    check_devices(name, tensors | {"seed": seed if dropout else None})
    refuse_tangents(name, *tensors.values())
    trained = [key for key, t in (("weight", on_device), ("bias", bias)) if t is not None and t.requires_grad]
    if trained and torch.is_grad_enabled():
        raise ConfigError(
            f"{name}: {' and '.join(trained)} requires a gradient, which this operation does not make: "
            "call lora_linear, or freeze it with requires_grad_(False)"
        )
