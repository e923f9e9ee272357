"""The operations lora_core::grouped_lora and lora_core::grouped_lora_backward.

The mathematics stands in lora_core/reference/grouped.py.
"""

import reprlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_core.errors import ConfigError, DtypeError, ShapeError
from lora_core.ops.checks import (
    autocast_dtype,
    check_devices,
    check_dtypes,
    check_shapes,
    check_sides,
    check_tensors,
    is_transformed,
    outside_autocast,
)
from lora_core.ops.eager import differentiable, dispatch_is_intercepted, gradients, hidden_of, none_to_empty
from lora_core.quant.blockwise import has_values
from lora_core.reference import grouped as reference


@torch.library.custom_op("lora_core::grouped_lora", mutates_args=())
def op(
    x: Tensor,
    base: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    ranks: Sequence[int],
    adapter: Tensor,
    scaling: Tensor,
) -> tuple[Tensor, Tensor]:
    return reference.forward(x, base, lora_a, lora_b, ranks, adapter, scaling)


@op.register_fake
def _(
    x: Tensor,
    base: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    ranks: Sequence[int],
    adapter: Tensor,
    scaling: Tensor,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], lora_b.shape[0]), lora_a.new_empty(x.shape[0] * max(ranks, default=0))


@torch.library.custom_op("lora_core::grouped_lora_backward", mutates_args=())
def backward_op(
    d_y: Tensor,
    x: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    ranks: Sequence[int],
    adapter: Tensor,
    scaling: Tensor,
    hidden: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    grads: tuple[Tensor, Tensor, Tensor]
    grads = none_to_empty(d_y, reference.backward(d_y, x, lora_a, lora_b, ranks, adapter, scaling, hidden, needs))
    return grads


@backward_op.register_fake
def _(
    d_y: Tensor,
    x: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    ranks: Sequence[int],
    adapter: Tensor,
    scaling: Tensor,
    hidden: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    like_x = d_y.new_empty(d_y.shape[0], lora_a.shape[1])
    d_x, d_lora_a, d_lora_b = (
        t.new_empty(t.shape) if need else d_y.new_empty(0)
        for t, need in zip((like_x, lora_a, lora_b), needs, strict=True)
    )
    return d_x, d_lora_a, d_lora_b


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, base, lora_a, lora_b, ctx.ranks, adapter, scaling = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    need_x, ctx.need_base, need_a, need_b, *_ = ctx.needs_input_grad
    ctx.needs = (need_x, need_a, need_b)
    ctx.save_for_backward(x if need_a else None, lora_a, lora_b, adapter, scaling, output[1])


def _backward(ctx, d_y: Tensor | None, _: None):  # type: ignore[no-untyped-def]
    x, lora_a, lora_b, adapter, scaling, hidden = ctx.saved_tensors
    if d_y is None:
        return (None,) * 7
    hidden = hidden_of(
        hidden, x, ctx.needs[0] and ctx.needs[2], lambda x: reference.shrink(x, lora_a, ctx.ranks, adapter)
    )
    grads = gradients(backward_op, d_y, x, lora_a, lora_b, ctx.ranks, adapter, scaling, hidden, ctx.needs)
    d_x, d_lora_a, d_lora_b = (g if need else None for g, need in zip(grads, ctx.needs, strict=True))
    return d_x, d_y if ctx.need_base else None, d_lora_a, d_lora_b, None, None, None


_run = differentiable(op, _save, _backward)


def grouped_lora(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ranks: Sequence[int],
    adapter: Tensor,
    scaling: Tensor,
    base: Tensor | None = None,
) -> Tensor:
    """Return base + s_g (x A_g^T) B_g^T row by row, each row with its own adapter g.

    Work and traffic follow each adapter's own rank. Differentiable in x, base, lora_a and lora_b; in
    torch.func's transforms as lora_linear is. Which row has which adapter is read on the device. Under autocast all
    operands are cast, as by a linear layer.

    Args:
        x: float32, float16, bfloat16 or float64 of shape [..., K], any strides.
        lora_a: the adapters' A one below the other, dtype of x or float32, shape [sum of ranks, K].
        lora_b: the adapters' B side by side, dtype of lora_a, shape [N, sum of ranks].
        ranks: rank of each adapter.
        adapter: int64, the shape of x without its last dimension; the adapter of each row, -1 for none.
        scaling: float32, one element for each adapter.
        base: dtype of x, shape [..., N]: the base layer's output; zeros by default.
    Returns:
        Shape [..., N], dtype of x.
    Raises:
        ShapeError, DtypeError, DeviceError: if the operands do not fit together.
        ConfigError: if a rank is negative, scaling is being trained or, where that can be seen without waiting for a
            GPU, an adapter does not exist. On a GPU a row of an adapter that
            does not exist has none.
    Source: Chen et al. 2023 (arXiv 2310.18547).
    """
    kinds: dict[str, object] = {"x": x, "lora_a": lora_a, "lora_b": lora_b, "adapter": adapter, "scaling": scaling}
    check_tensors("grouped_lora", kinds if base is None else kinds | {"base": base})
    cast = autocast_dtype(x)
    if cast is not None:
        x, lora_a, lora_b = x.to(cast), lora_a.to(cast), lora_b.to(cast)
        base = None if base is None else base.to(cast)
    _check(x, lora_a, lora_b, ranks, adapter, scaling, base)
    if scaling.requires_grad and torch.is_grad_enabled():
        raise ConfigError("grouped_lora: scaling requires a gradient, which is not made: pass scaling.detach()")
    if is_transformed():
        with outside_autocast(x):
            return reference.grouped_lora(x, base, lora_a, lora_b, ranks, adapter, scaling)
    shape = (*x.shape[:-1], lora_b.shape[0])
    flat, rows = x.reshape(-1, x.shape[-1]), adapter.reshape(-1)
    flat_base = None if base is None else base.reshape(-1, shape[-1])
    with outside_autocast(x):
        y, _ = _run(flat, flat_base, lora_a, lora_b, ranks, rows, scaling)
    return y.view(shape)


def _check(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ranks: Sequence[int],
    adapter: Tensor,
    scaling: Tensor,
    base: Tensor | None,
) -> None:
    name = "grouped_lora"
    if not isinstance(ranks, Sequence) or not all(isinstance(r, int | torch.SymInt) and r >= 0 for r in ranks):
        raise ConfigError(f"{name}: ranks are {reprlib.repr(ranks)}; want a list of whole numbers, none below 0")
    n = lora_b.shape[0] if lora_b.dim() else 0
    weight = (n, x.shape[-1] if x.dim() else 0)
    check_shapes(name, x, weight, None, lora_a, lora_b)
    check_sides(name, weight)
    if sum(ranks) != lora_a.shape[0]:
        raise ShapeError(f"{name}: ranks {list(ranks)} add up to {sum(ranks)}; lora_a has {lora_a.shape[0]} rows")
    wanted = {"adapter": (adapter, x.shape[:-1]), "scaling": (scaling, (len(ranks),))}
    if base is not None:
        wanted["base"] = (base, (*x.shape[:-1], n))
    for what, (tensor, shape) in wanted.items():
        if tensor.shape != shape:
            raise ShapeError(f"{name}: {what} has shape {tuple(tensor.shape)}; want {tuple(shape)}")
    check_dtypes(name, {"x": x, "base": base}, lora_a, lora_b)
    if adapter.dtype != torch.int64 or scaling.dtype != torch.float32:
        got = f"{adapter.dtype} and {scaling.dtype}"
        raise DtypeError(f"{name}: want adapter torch.int64 and scaling torch.float32; got {got}")
    check_devices(
        name, {"x": x, "lora_a": lora_a, "lora_b": lora_b, "adapter": adapter, "scaling": scaling, "base": base}
    )
    # on a GPU asking would wait for it; whoever traces or transforms has no answer
    if adapter.device.type != "cpu" or dispatch_is_intercepted() or not has_values(adapter):
        return
    low, high = (t.item() for t in adapter.aminmax())
    if low < -1 or high >= len(ranks):
        raise ConfigError(f"{name}: adapters from {low} to {high}; want -1 for none, or below {len(ranks)}")
