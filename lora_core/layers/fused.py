"""Forwards that run one fused operation in layers of other libraries, and how a layer's class is swapped for such.

A fused layer is the same object as before with another class, a subclass of its own: parameters, names, hooks and
state dict stay, isinstance still holds, and an optimiser or the other library goes on as if nothing had happened.
torch.nn.utils.parametrize and FSDP swap classes in the same way.

What a fused forward cannot do (a merged or disabled adapter, a per-sample adapter_names, a variant such as DoRA), the
layer's own forward does.
"""

import sys
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_core.layers.bitsandbytes_weight import packed_weight
from lora_core.layers.dropout import fresh_seed
from lora_core.layers.linear import runs_as_written
from lora_core.ops.checks import autocast_on
from lora_core.ops.lora_linear import lora_linear
from lora_core.ops.nf4_lora_linear import packed_lora_linear
from lora_core.reference.lora import lora_delta


class Fused:
    """What every fused class inherits first.

    On its own it marks a layer of this library, whose forward runs the fused operation already.
    """

    fused_from: ClassVar[type[nn.Module]]
    fused_by: ClassVar[type["Fused"]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class has no name to be found by: copies and pickles make it anew
        return _rebuild, (self.fused_by, self.fused_from), self.__dict__


_made: dict[tuple[type, type], Any] = {}


def fused_class(mixin: type[Fused], original: type[nn.Module]) -> Any:
    """Return the class whose forward is the mixin's and whose all else is the original's, one for each pair."""
    if (mixin, original) not in _made:
        own = {"fused_from": original, "fused_by": mixin, "__module__": mixin.__module__, "__doc__": mixin.__doc__}
        _made[mixin, original] = type(f"Fused{original.__name__}", (mixin, original), own)
    return _made[mixin, original]


def _rebuild(mixin: type[Fused], original: type[nn.Module]) -> Any:
    made = fused_class(mixin, original)
    return made.__new__(made)


class FusedBitsandbytes(Fused):
    """A bitsandbytes Linear4bit without adapter: decodes its weight in the product, or once for many tokens."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        w = packed_weight(self)
        if w is None or args or kwargs:
            y: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return y
        return four_bit(self, w, x, None, None, 0.0)


class FusedPeft(Fused):
    """A PEFT LoRA layer on nn.Linear, transformers' Conv1D or bitsandbytes' Linear4bit: base and adapter in one."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = [] if self.merged or self.disable_adapters else [n for n in self.active_adapters if n in self.lora_A]
        plain = not args and not kwargs and all(is_plain(self, name, x) for name in names)
        y = self._fused_forward(x, names) if names and plain and is_as_written(self.base_layer) else None
        return y if y is not None else super().forward(x, *args, **kwargs)  # type: ignore[misc]

    def _fused_forward(self: Any, x: Tensor, names: list[str]) -> Tensor | None:
        base = self.base_layer
        first, *others = ((*_matrices(self, name), *_dropout(self, name, x)) for name in names)
        if is_four_bit(base):
            w = packed_weight(base)
            y = None if w is None else four_bit(base, w, x, *first)
        else:
            weight = base.weight if isinstance(base, nn.Linear) else base.weight.T
            y = lora_linear(x, weight, base.bias, *first)
        if y is None:
            return None
        for lora_a, lora_b, scaling, p, seed in others:
            low = x if autocast_on(x) else x.to(lora_a.dtype)
            y = y + lora_delta(low, lora_a, lora_b, scaling, p, seed).to(y.dtype)
        return y


def _matrices(layer: Any, name: str) -> tuple[Tensor, Tensor, float]:
    return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]


def _dropout(layer: Any, name: str, x: Tensor) -> tuple[float, Tensor | None]:
    dropout = layer.lora_dropout[name]
    p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return p, fresh_seed(x.device) if p else None


def is_four_bit(base: Any) -> bool:
    """Say whether this is bitsandbytes' Linear4bit, which alone among linear layers packs its weight into a column."""
    return hasattr(base, "quant_state") and hasattr(base, "compute_type_is_set")


def is_plain(layer: Any, name: str, x: Tensor | None = None) -> bool:
    """Say whether this PEFT adapter is B A and dropout, nothing else, in a dtype that the operation takes."""
    pieces = (layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name])
    kinds = (nn.Linear, nn.Linear, nn.Dropout if isinstance(pieces[2], nn.Dropout) else nn.Identity)
    low = pieces[0].weight.dtype
    return (
        name not in layer.lora_variant
        and not layer.lora_bias.get(name)
        and all(runs_as_written(piece, kind.forward) for piece, kind in zip(pieces, kinds, strict=True))
        and (x is None or low in (x.dtype, torch.float32) or autocast_on(x))
    )


def own_forward(base: Any) -> Any:
    """Return the forward that the library of a linear layer gave it: PyTorch's, bitsandbytes' or transformers'."""
    where, name = "transformers.pytorch_utils", "Conv1D"
    if isinstance(base, nn.Linear):
        where, name = ("bitsandbytes.nn", "Linear4bit") if is_four_bit(base) else ("torch.nn", "Linear")
    return getattr(getattr(sys.modules.get(where), name, None), "forward", None)


def is_as_written(base: Any) -> bool:
    """Say whether calling a linear layer means its library's own forward: no subclass, hook or patch stands between."""
    own = own_forward(base)
    return own is not None and runs_as_written(base, own)


def four_bit(
    layer: Any,
    w: Any,
    x: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Return a Linear4bit's output with an adapter, in the dtypes that bitsandbytes would compute and return."""
    if not layer.compute_type_is_set:
        layer.set_compute_type(x)
        layer.compute_type_is_set = True
    compute = x if layer.compute_dtype is None else x.to(layer.compute_dtype)
    if lora_a is not None and lora_b is not None and not autocast_on(x):
        # the operation wants A and B in the dtype of x or in float32
        lora_a, lora_b = (t if t.dtype == compute.dtype else t.float() for t in (lora_a, lora_b))
    bias = None if layer.bias is None else layer.bias.to(compute.dtype)
    return packed_lora_linear(compute, w, bias, lora_a, lora_b, scaling, dropout, seed).to(x.dtype)
