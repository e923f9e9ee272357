"""How a layer's class is swapped for one whose forward runs one fused operation, and what such classes share.

A fused layer is the same object as before with another class, a subclass of its own: parameters, names, hooks and
state dict stay, isinstance still holds, and an optimiser or the other library goes on as if nothing had happened.
torch.nn.utils.parametrize and FSDP swap classes in the same way. fused_lora.py has the class for this library's layers,
fused_peft.py those for PEFT's and bitsandbytes'.

What a fused forward cannot do (a merged or disabled adapter, a per-sample adapter_names, a variant such as DoRA), the
layer's own forward does.
"""

import weakref
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_core.layers.siblings import Siblings, Term
from lora_core.ops.checks import autocast_dtype
from lora_core.ops.layer import Layer


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

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        # the class has no name to be found by: copies and pickles make it anew, without what compile() bound to this
        return _rebuild, (self.fused_by, self.fused_from), self.__getstate__()


# by the original and the mixin; held by the layers that are of it, as it holds the original
_made: weakref.WeakKeyDictionary[type, dict[type, weakref.ref[Any]]] = weakref.WeakKeyDictionary()


def fused_class(mixin: type[Fused], original: type[nn.Module]) -> Any:
    """Return the class whose forward is the mixin's and whose all else is the original's, one for each pair."""
    of_original = _made.setdefault(original, {})
    found = of_original[mixin]() if mixin in of_original else None
    if found is None:
        own = {"fused_from": original, "fused_by": mixin, "__module__": mixin.__module__, "__doc__": mixin.__doc__}
        found = type(f"Fused{original.__name__}", (mixin, original), own)
        of_original[mixin] = weakref.ref(found)
    return found


def _rebuild(mixin: type[Fused], original: type[nn.Module]) -> Any:
    made = fused_class(mixin, original)
    return made.__new__(made)


def term_of(layer: Layer, x: Tensor, compute: torch.dtype, result: torch.dtype, state: Any) -> Term | None:
    """Return a layer's term if the common operation takes its dtypes; else the layer says itself what is wrong."""
    cast = autocast_dtype(x) is not None
    fits = cast or layer.lora_a.dtype in (compute, torch.float32)
    fits = fits and (cast or not isinstance(layer.weight, Tensor) or layer.weight.dtype == compute)
    return Term(layer, compute, result, state) if fits and x.shape[-1:] == tuple(layer.weight.shape[1:]) else None


def is_frozen(base: Any) -> bool:
    """Say whether a layer's weight is held, not computed at each use, and neither it nor the bias is trained."""
    weight, bias = base._parameters.get("weight", base._modules.get("weight")), base.bias
    return (
        weight is not None
        and not getattr(weight, "requires_grad", False)
        and not (bias is not None and bias.requires_grad)
    )
