"""Fused layers that a parent calls one after another with one x: the first called computes for all of them.

Query, key and value of an attention, gate and up of an MLP: together they read x once (ops/lora_linears.py). Each
layer is still called and still returns its own output, so that hooks, names and the parent's code stay as they are.
An output is handed out only for the very tensor it was computed from, where nothing that it depends on has changed: not
the tensor, grad mode or autocast, nor the layer that asks. For any other, and for few rows, a layer computes alone. So
it does with dropout: masked by each layer's own mask, x is read once for each anyway, and a seed that is not drawn when
its layer is called is another one where checkpointing runs the call again.
"""

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_core.ops.checks import autocast_dtype, autocast_on, is_transformed
from lora_core.ops.layer import Layer
from lora_core.ops.lora_linears import lora_linears

# putting all A on top of each other costs what reading x costs for as many rows as there are ranks: with few rows, as
# when one token is generated, every layer is on its own
FEW_ROWS = 64


class Term(NamedTuple):
    """What a layer adds to the common operation.

    Args:
        layer: its operands.
        compute: dtype that x is cast to.
        result: dtype of the layer's output.
        state: the layer's term_state.
    """

    layer: Layer
    compute: torch.dtype
    result: torch.dtype
    state: Any


class Held(NamedTuple):
    """Outputs that no layer has asked for yet, and what they were computed from.

    Args:
        x: the input, held weakly.
        around: as _around returned it then.
        states: every layer's term_state then.
        outputs: in the order of the layers; None where it was handed out.
    """

    x: Any
    around: tuple[Any, ...]
    states: list[Any]
    outputs: list[Tensor | None]


class Siblings:
    """The layers of one parent that read the same x.

    Args:
        members: fused layers in the order in which the parent calls them; held weakly.
    """

    def __init__(self, members: Sequence[Any]) -> None:
        self._members = tuple(weakref.ref(m) for m in members)
        self._held: Held | None = None

    @property
    def members(self) -> list[Any]:
        """The layers; one that is gone is missing."""
        return [m for m in (ref() for ref in self._members) if m is not None]

    def output(self, layer: Any, x: Tensor) -> Tensor | None:
        """Return what layer makes of x if it can be had for all at once, else None."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed() or x.is_nested or not x.dim():
            # what is held between two calls is no part of a graph
            return None
        if x.is_inference() or x.numel() <= FEW_ROWS * x.shape[-1]:
            # a tensor made under inference_mode keeps no count of changes in place
            return None
        members = self.members
        # a copy that runs for a member, as on another GPU, is none itself
        place = next((i for i, member in enumerate(members) if member is layer), None)
        if place is None:
            return None
        if place == 0:
            self._held = self._compute(members, x)
        held = self._held
        if held is None:
            return None
        same = held.x() is x and held.around == _around(x)
        # what was computed just now has not changed
        if not same or (place and held.states[place] != layer.term_state(x)):
            self._held = None
            return None
        y, held.outputs[place] = held.outputs[place], None
        if not any(out is not None for out in held.outputs):
            self._held = None
        return y

    def _compute(self, members: list[Any], x: Tensor) -> Held | None:
        if any(m._backward_hooks or m._backward_pre_hooks or m._forward_pre_hooks for m in members):
            # the first two get a tensor of their own from PyTorch; the third, as FSDP's, may make a layer's operands
            return None
        terms = [m.term(x) for m in members]
        found: list[Term] = [t for t in terms if t is not None]
        kinds = {(t.compute, t.result, t.layer.lora_a.dtype, m.training) for t, m in zip(found, members, strict=False)}
        if len(members) < len(self._members) or len(found) < len(members) or len(kinds) > 1:
            return None
        layers = [t.layer for t in found]
        if any(layer.dropout for layer in layers):
            return None
        compute = x if autocast_on(x) else x.to(found[0].compute)
        ys = lora_linears(compute, layers)
        outputs: list[Tensor | None] = [y.to(found[0].result) for y in ys]
        return Held(weakref.ref(x), _around(x), [t.state for t in found], outputs)

    # copies and pickles of a model hold copies of its layers, and no outputs; as a state, since layers refer back here

    def __getstate__(self) -> list[Any]:
        return self.members

    def __setstate__(self, members: list[Any]) -> None:
        Siblings.__init__(self, members)


def _around(x: Tensor) -> tuple[Any, ...]:
    """Return what an output of x depends on besides x and its layer: changes of x in place, grad mode, autocast."""
    autocast = autocast_dtype(x)
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return x._version, x.requires_grad, *modes, autocast


def version_of(t: Tensor | None) -> tuple[Any, ...]:
    """Return what tells a tensor from any other, and from itself before it changed or got other memory."""
    if t is None:
        return ()
    return id(t), t.data_ptr(), t.requires_grad, 0 if t.is_inference() else t._version
