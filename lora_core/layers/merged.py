"""What a layer whose adapters are inside its weight does in training: it computes, and refuses a backward."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lora_core.errors import AdapterError
from lora_core.ops.eager import dispatch_is_intercepted


@dataclass
class Merged:
    """Which adapters are inside a model's weights, and a CPU copy of what this layer's weight was before.

    The copy is empty where none of them has a part in the layer: as long as they are merged, it runs no other.
    """

    names: tuple[str, ...]
    backup: dict[str, Tensor] = field(repr=False, default_factory=dict)

    @property
    def backup_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.backup.values())


class _Refused(torch.autograd.Function):
    """The identity, without a gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, always: Tensor, names: tuple[str, ...]) -> Tensor:
        ctx.names = names
        # no view: a layer behind it may change it in place
        return torch.ops.aten._unsafe_view.default(y, y.shape)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> Any:
        raise AdapterError(
            f"cannot train while {list(ctx.names)} is merged into the weights, where its matrices take no gradient: "
            "call unmerge_adapter(model) first, or merge_and_unload(model) to train other parts of the model; for a "
            "gradient of the input alone call model.eval()"
        )


def refuse_backward(y: Tensor, names: tuple[str, ...]) -> Tensor:
    """Return the output of a layer with these adapters merged, so that a backward through it is an AdapterError.

    A compiler, a tracer, a transform of torch.func or forward-mode differentiation gets the output as it is.
    """
    if not torch.is_grad_enabled() or dispatch_is_intercepted() or forward_ad._current_level >= 0 or y.is_nested:
        return y
    refused: Tensor = _Refused.apply(y, torch.empty(0, device=y.device, requires_grad=True), names)
    return refused
