"""This library's LoRA on linear layers, fused: alone they are already; here they take part with their siblings."""

from typing import Any

from torch import Tensor

from lora_core.layers.fused import Fused, is_frozen, term_of
from lora_core.layers.nf4_linear import NF4Linear
from lora_core.layers.siblings import Term, version_of
from lora_core.ops.checks import autocast_dtype
from lora_core.ops.layer import Layer
from lora_core.ops.packed import Packed


class FusedLora(Fused):
    """LoRA on a linear layer as this library runs it; fused with its siblings, too."""

    def term(self: Any, x: Tensor) -> Term | None:
        names = self.running()
        base = self.base_layer
        if len(names) != 1 or self.owed() or not self.is_as_written() or not is_frozen(base):
            return None
        if not (self.lora_a.is_plain(names[0]) and self.lora_b.is_plain(names[0])):
            return None
        compute, bias = x.dtype, self.bias
        if isinstance(base, NF4Linear):
            compute = base.compute_dtype or compute
            bias = None if bias is None else bias.to(compute)
        scaling, dropout = self.adapters[names[0]].scaling, self.dropout_of(names[0])
        (lora_a, lora_b), weight = self.matrices(names[0], x), self.weight_operand()
        layer = Layer(weight, bias, lora_a, lora_b, scaling, dropout)
        return term_of(layer, x, compute, autocast_dtype(x) or x.dtype, self._state(names, weight))

    def term_state(self: Any, x: Tensor) -> Any:
        return self._state(self.running(), self.weight_operand()) if self.is_as_written() else None

    def _state(self: Any, names: tuple[str, ...], weight: Tensor | Packed) -> Any:
        pairs = [
            (version_of(self.lora_a[n]), version_of(self.lora_b[n]), self.adapters[n].scaling, self.dropout_of(n))
            for n in names
        ]
        # a transpose is made anew for each call: what it is of counts
        base = (self.bias, *(weight[:4] if isinstance(weight, Packed) else (self.weight,)))
        return [version_of(t) for t in base], pairs
