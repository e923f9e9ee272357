"""PEFT's LoRA on linear layers, and bitsandbytes' Linear4bit, run by this library's operations.

Neither library is imported. A PEFT layer has base_layer, lora_A, lora_B and lora_dropout by adapter name, scaling,
active_adapters, merged and disable_adapters. Source: PEFT 0.21, LoraLayer.
"""

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.layers.as_written import runs_as_written
from lora_core.layers.bitsandbytes_weight import four_bit, four_bit_operands, is_four_bit, packed_weight, quant_state
from lora_core.layers.dropout import fresh_seed
from lora_core.layers.fused import Fused, is_frozen, term_of
from lora_core.layers.siblings import Term, version_of
from lora_core.ops.checks import autocast_dtype, autocast_on
from lora_core.ops.layer import Layer
from lora_core.ops.lora_linear import lora_linear
from lora_core.reference.lora import lora_delta


class FusedBitsandbytes(Fused):
    """A bitsandbytes Linear4bit without adapter: decodes its weight in the product, or once for many tokens."""

    def alone(self: Any, x: Tensor) -> Tensor | None:
        w = packed_weight(self)
        return None if w is None else four_bit(self, w, x, None, None, 0.0)


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
        if len(names) != 1 or not is_frozen(base):
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
        return term_of(layer, x, compute, result, self._state(names))

    def term_state(self: Any, x: Tensor) -> Any:
        return self._state(self._fusible(x))

    def _state(self: Any, names: list[str]) -> Any:
        pairs = [(_matrices(self, name), _probability(self, name)) for name in names]
        base, state = self.base_layer, quant_state(self.base_layer)
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
        plain = taken and not x.is_nested and not any(oddity(self, name) for name in names)
        return names if plain and is_as_written(self.base_layer) else []


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
