"""A linear layer with its low-rank path, as operations are given it, and what is checked before they take it."""

from typing import NamedTuple

from torch import Tensor

from lora_core.ops.checks import (
    autocast_dtype,
    check_devices,
    check_dropout,
    check_dtypes,
    check_kinds,
    check_shapes,
    check_sides,
)
from lora_core.ops.packed import Packed, dense
from lora_core.reference import lora as reference


class Layer(NamedTuple):
    """A linear layer with its low-rank path.

    Args:
        weight: W, dtype of x, shape [N, K], or the parts of an NF4 weight of that shape.
        bias, lora_a, lora_b, scaling, dropout, seed: as lora_linear takes them.
    """

    weight: Tensor | Packed
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    dropout: float = 0.0
    seed: Tensor | None = None


def by_formula(x: Tensor, layer: Layer) -> Tensor:
    """Return the layer's output by the plain formula, which torch.func and forward mode take as they take any other."""
    return reference.lora_linear(x, dense(layer.weight, x.dtype), *layer[1:])


def prepared(op: str, x: Tensor, layer: Layer) -> tuple[Tensor, Layer]:
    """Return x and the layer with floats for its numbers, and under autocast cast, as torch.nn.functional.linear does.

    Raises:
        ShapeError, DtypeError, DeviceError: if the operands do not fit together.
        ConfigError: if scaling is no finite number, or dropout no probability or without a seed.
    """
    w, bias, lora_a, lora_b, scaling, dropout, seed = layer
    kinds: dict[str, object] = {"x": x} if isinstance(w, Packed) else {"x": x, "weight": w}
    scaling = check_kinds(op, kinds | {"lora_a": lora_a, "lora_b": lora_b}, bias, scaling)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, lora_a, lora_b = x.to(dtype), lora_a.to(dtype), lora_b.to(dtype)
        w = w if isinstance(w, Packed) else w.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    check_shapes(op, x, tuple(w.shape), bias, lora_a, lora_b)
    check_sides(op, tuple(w.shape))
    held = {"q": w.codes} if isinstance(w, Packed) else {"weight": w}
    operands: dict[str, Tensor | None] = {"x": x, **held, "bias": bias}
    check_dtypes(op, {k: t for k, t in operands.items() if k != "q"}, lora_a, lora_b)
    dropout = check_dropout(op, dropout, seed)
    operands |= {"lora_a": lora_a, "lora_b": lora_b}
    check_devices(op, operands | {"seed": seed if dropout else None})
    return x, Layer(w, bias, lora_a, lora_b, scaling, dropout, seed)
