"""The operations lora_core::lora_linears and its backward: several frozen layers, dense or NF4, that read one x.

The mathematics stands in lora_core/reference/lora_linears.py.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lora_core.errors import ConfigError, DtypeError
from lora_core.ops.checks import check_tensors, is_transformed, outside_autocast
from lora_core.ops.eager import differentiable, gradients, hidden_of, none_to_empty
from lora_core.ops.layer import Layer, by_formula, prepared
from lora_core.ops.packed import Packed, dense, flatten, unflatten
from lora_core.ops.ready import ready
from lora_core.reference import lora_linears as reference


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
    ranks, masks = [len(a) for a in lora_as], (ctx.dropouts, empty_to_none(seeds))
    hidden = hidden_of(hidden, x, False, lambda x: reference.shrink(x.reshape(-1, x.shape[-1]), lora_as, *masks))
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
        found = gradients(backward_op, d_ys, x, *packed, *adapter[:2], hidden, *adapter[2:], *needs)
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

    Differentiable in x and in every A and B; in torch.func's transforms as lora_linear is. With dropout each layer
    draws a mask of its own, and x is read once for each. Under autocast all operands are cast, as by
    torch.nn.functional.linear.

    Args:
        x: float32, float16, bfloat16 or float64 of shape [..., K], any strides.
        layers: at least one, frozen but for A and B, which are of one dtype in all.
    Returns:
        One tensor for each layer, shape [..., N], dtype of x.
    Raises:
        ShapeError, DtypeError, DeviceError: if the operands do not fit together.
        ConfigError: if there is no layer, a weight or bias is being trained, scaling is no finite number, or dropout is
            no probability or has no seed.
    Source: Hu et al. 2021, eq. 3.
    """
    check_tensors("lora_linears", {"x": x})
    if not layers:
        raise ConfigError("lora_linears: layers is empty: want at least one")
    checked = []
    for i, layer in enumerate(layers):
        if not _ready(x, layer):
            x, layer = _prepared(f"lora_linears, layer {i}", x, layer)
        checked.append(layer)
    lows = {layer.lora_a.dtype for layer in checked}
    if len(lows) > 1:
        raise DtypeError(
            f"lora_linears: want lora_a and lora_b of all layers in one dtype; got {sorted(map(str, lows))}: "
            "call lora_linear for each"
        )
    if is_transformed():
        with outside_autocast(x):
            return [by_formula(x, layer) for layer in checked]
    weights, biases, lora_as, lora_bs, scalings, dropouts, seeds = map(list, zip(*checked, strict=True))
    none = x.new_empty(0)
    tensors, formats = flatten(weights)
    seeds = [x.new_empty(0, dtype=torch.int64) if s is None else s for s in seeds]
    biases = [none if b is None else b for b in biases]
    with outside_autocast(x):
        return list(_run(x, tensors, formats, biases, lora_as, lora_bs, scalings, dropouts, seeds)[:-1])


def _ready(x: Tensor, layer: Layer) -> bool:
    """Say whether a layer can be taken as it is; never where _prepared would refuse or convert anything."""
    return type(layer) is Layer and ready(x, *layer) and not _trained(layer)


def _trained(layer: Layer) -> list[str]:
    """Return which of a layer's operands are being trained, as far as gradients are made, and have to be frozen."""
    if not torch.is_grad_enabled():
        return []
    frozen = {"weight": layer.weight, "bias": layer.bias}
    return [key for key, t in frozen.items() if isinstance(t, Tensor) and t.requires_grad]


def _prepared(name: str, x: Tensor, layer: Layer) -> tuple[Tensor, Layer]:
    """Return x and a layer as the operation takes them; raise unless it does."""
    if not isinstance(layer, Layer):
        raise ConfigError(f"{name} is a {type(layer).__name__}; want a lora_core.ops.layer.Layer")
    if not isinstance(layer.weight, (Tensor, Packed)):
        raise DtypeError(f"{name}: weight is a {type(layer.weight).__name__}; want a torch.Tensor, or Packed.of(q)")
    x, layer = prepared(name, x, layer)
    trained = _trained(layer)
    if trained:
        raise ConfigError(
            f"{name}: {' and '.join(trained)} requires a gradient, which this operation does not make: "
            "call lora_linear, or freeze it with requires_grad_(False)"
        )
    return x, layer
