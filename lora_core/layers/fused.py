"""Forwards that run one fused operation in layers of other libraries, and how a layer's class is swapped for such.

A fused layer is the same object as before with another class, a subclass of its own: parameters, names, hooks and
state dict stay, isinstance still holds, and an optimiser or the other library goes on as if nothing had happened.
torch.nn.utils.parametrize and FSDP swap classes in the same way.

What a fused forward cannot do (a merged or disabled adapter, a per-sample adapter_names, a variant such as DoRA), the
layer's own forward does.
"""

import math
import sys
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_core.layers.bitsandbytes_weight import packed_weight
from lora_core.layers.dropout import fresh_seed
from lora_core.layers.linear import runs_as_written
from lora_core.layers.nf4_linear import NF4Linear
from lora_core.layers.siblings import Siblings, Term, version_of
from lora_core.ops.checks import autocast_dtype, autocast_on
from lora_core.ops.lora_linear import lora_linear
from lora_core.ops.lora_linears import Layer
from lora_core.ops.nf4_lora_linear import packed_lora_linear
from lora_core.ops.packed import Packed
from lora_core.reference.lora import lora_delta


class Fused:
    """What every fused class inherits first.

    On its own it marks a layer of this library, whose forward runs the fused operation already.
    """

    fused_from: ClassVar[type[nn.Module]]
    fused_by: ClassVar[type["Fused"]]
    siblings: Siblings | None = None

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(self, Fused):
            # what was bound while the layer was fused, as hooks do, is called after unfuse
            unfused: Tensor = type(self).forward(self, *args, **kwargs)
            return unfused
        y = None
        if len(args) == 1 and not kwargs:
            y = None if self.siblings is None else self.siblings.output(self, args[0])
            y = self.alone(args[0]) if y is None else y
        return y if y is not None else super().forward(*args, **kwargs)  # type: ignore[misc]

    def alone(self: Any, x: Tensor) -> Tensor | None:
        """Return the output by a fused operation of this layer's own; None where its own forward has to run."""

    def term(self: Any, x: Tensor) -> Term | None:
        """Return what the layer adds to an operation with its siblings; None where it takes no part, as it is now."""

    def term_state(self: Any, x: Tensor) -> Any:
        """Return what the term is made of besides x, to be compared with what it was."""

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

    def alone(self: Any, x: Tensor) -> Tensor | None:
        w = packed_weight(self)
        return None if w is None else four_bit(self, w, x, None, None, 0.0)


class FusedLora(Fused):
    """LoRA on a linear layer as this library runs it; fused with its siblings, too."""

    def term(self: Any, x: Tensor) -> Term | None:
        names = self.running()
        base = self.base_layer
        if len(names) != 1 or self.owed() or not self.is_as_written() or not _is_frozen(base):
            return None
        compute, bias = x.dtype, self.bias
        if isinstance(base, NF4Linear):
            compute = base.compute_dtype or compute
            bias = None if bias is None else bias.to(compute)
        scaling, dropout = self.adapters[names[0]].scaling, self.dropout_of(names[0])
        (lora_a, lora_b), weight = self.matrices(names[0], x), self.operand()
        layer = Layer(weight, bias, lora_a, lora_b, scaling, dropout)
        return _term(layer, x, compute, autocast_dtype(x) or x.dtype, self._state(names, weight))

    def term_state(self: Any, x: Tensor) -> Any:
        return self._state(self.running(), self.operand()) if self.is_as_written() else None

    def _state(self: Any, names: list[str], weight: Tensor | Packed) -> Any:
        pairs = [
            (version_of(self.lora_a[n]), version_of(self.lora_b[n]), self.adapters[n].scaling, self.dropout_of(n))
            for n in names
        ]
        # a transpose is made anew for each call: what it is of counts
        base = (self.bias, *(weight[:4] if isinstance(weight, Packed) else (self.weight,)))
        return [version_of(t) for t in base], pairs


class FusedPeft(Fused):
    """A PEFT LoRA layer on nn.Linear, transformers' Conv1D or bitsandbytes' Linear4bit: base and adapter in one."""

    def alone(self: Any, x: Tensor) -> Tensor | None:
        names = self._fusible(x)
        if not names:
            return None
        base = self.base_layer
        first, *others = ((*_matrices(self, name), *_dropout(self, name, x)) for name in names)
        if is_four_bit(base):
            w = packed_weight(base)
            y = None if w is None else four_bit(base, w, x, *first)
        else:
            y = lora_linear(x, _dense_weight(base), base.bias, *first)
        if y is None:
            return None
        for lora_a, lora_b, scaling, p, seed in others:
            low = x if autocast_on(x) else x.to(lora_a.dtype)
            y = y + lora_delta(low, lora_a, lora_b, scaling, p, seed).to(y.dtype)
        return y

    def term(self: Any, x: Tensor) -> Term | None:
        names, base = self._fusible(x), self.base_layer
        if len(names) != 1 or not _is_frozen(base):
            return None
        lora_a, lora_b, scaling = _matrices(self, names[0])
        bias, compute, result = base.bias, x.dtype, x.dtype
        weight: Any
        if is_four_bit(base):
            weight = packed_weight(base)
            compute, bias, lora_a, lora_b = four_bit_operands(base, x, lora_a, lora_b)
        else:
            weight = _dense_weight(base)
            result = autocast_dtype(x) or result
        if weight is None:
            return None
        layer = Layer(weight, bias, lora_a, lora_b, scaling, _probability(self, names[0]))
        return _term(layer, x, compute, result, self._state(names))

    def term_state(self: Any, x: Tensor) -> Any:
        return self._state(self._fusible(x))

    def _state(self: Any, names: list[str]) -> Any:
        pairs = [(_matrices(self, name), _probability(self, name)) for name in names]
        base, state = self.base_layer, getattr(self.base_layer.weight, "quant_state", None)
        scales = () if state is None else (state.absmax, state.offset, state.state2 and state.state2.absmax)
        return (
            [version_of(t) for t in (base.weight, base.bias, *scales)],
            [(version_of(a), version_of(b), scaling, p) for (a, b, scaling), p in pairs],
        )

    def _fusible(self: Any, x: Tensor) -> list[str]:
        """Return the adapters that run, if a fused operation can run them as they are now."""
        names = [] if self.merged or self.disable_adapters else [n for n in self.active_adapters if n in self.lora_A]
        lows = {self.lora_A[name].weight.dtype for name in names}
        taken = autocast_on(x) or lows <= {x.dtype, torch.float32}
        plain = taken and not any(oddity(self, name) for name in names)
        return names if plain and is_as_written(self.base_layer) else []


def _term(layer: Layer, x: Tensor, compute: torch.dtype, result: torch.dtype, state: Any) -> Term | None:
    """Return a layer's term if the common operation takes its dtypes; else the layer says itself what is wrong."""
    cast = autocast_dtype(x) is not None
    fits = cast or layer.lora_a.dtype in (compute, torch.float32)
    fits = fits and (cast or not isinstance(layer.weight, Tensor) or layer.weight.dtype == compute)
    return Term(layer, compute, result, state) if fits and x.shape[-1:] == tuple(layer.weight.shape[1:]) else None


def _is_frozen(base: Any) -> bool:
    weight, bias = base.weight, base.bias
    return not getattr(weight, "requires_grad", False) and not (bias is not None and bias.requires_grad)


def _dense_weight(base: Any) -> Tensor:
    """Return W [N, K] of nn.Linear or Conv1D, which stores its transpose."""
    weight: Tensor = base.weight if isinstance(base, nn.Linear) else base.weight.T
    return weight


def _matrices(layer: Any, name: str) -> tuple[Tensor, Tensor, float]:
    return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]


def _probability(layer: Any, name: str) -> float:
    dropout = layer.lora_dropout[name]
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def _dropout(layer: Any, name: str, x: Tensor) -> tuple[float, Tensor | None]:
    p = _probability(layer, name)
    return p, fresh_seed(x.device) if p else None


def is_four_bit(base: Any) -> bool:
    """Say whether this is bitsandbytes' Linear4bit, which alone among linear layers packs its weight into a column."""
    return hasattr(base, "quant_state") and hasattr(base, "compute_type_is_set")


def oddity(layer: Any, name: str) -> str:
    """Return what makes a PEFT adapter something else than B A and dropout; "" where it is nothing else."""
    pieces = (layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name])
    kinds = (nn.Linear, nn.Linear, nn.Dropout if isinstance(pieces[2], nn.Dropout) else nn.Identity)
    scaling = layer.scaling[name]
    if name in layer.lora_variant:
        return "is more than LoRA"
    if layer.lora_bias.get(name):
        return "has a bias in B"
    # a tensor where PEFT has prepared the layer for adapters that are swapped
    if not isinstance(scaling, (int, float)) or not math.isfinite(scaling):
        return f"has the scaling {scaling!r}: want a finite number"
    if getattr(pieces[2], "p", 0.0) >= 1:
        return "drops everything: want a dropout below 1"
    if not all(runs_as_written(piece, kind.forward) for piece, kind in zip(pieces, kinds, strict=True)):
        return "has hooks, or layers of its own beside A, B and dropout"
    return ""


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
    compute, bias, lora_a, lora_b = four_bit_operands(layer, x, lora_a, lora_b)
    return packed_lora_linear(x.to(compute), w, bias, lora_a, lora_b, scaling, dropout, seed).to(x.dtype)


def four_bit_operands(
    layer: Any, x: Tensor, lora_a: Tensor | None, lora_b: Tensor | None
) -> tuple[torch.dtype, Tensor | None, Any, Any]:
    """Return the dtype in which bitsandbytes would compute, and bias, A and B as the operation takes them then."""
    if not layer.compute_type_is_set:
        layer.set_compute_type(x)
        layer.compute_type_is_set = True
    compute: torch.dtype = x.dtype if layer.compute_dtype is None else layer.compute_dtype
    if lora_a is not None and lora_b is not None and not autocast_on(x):
        # the operation wants A and B in the dtype of x or in float32
        lora_a, lora_b = (t if t.dtype == compute else t.float() for t in (lora_a, lora_b))
    return compute, None if layer.bias is None else layer.bias.to(compute), lora_a, lora_b
