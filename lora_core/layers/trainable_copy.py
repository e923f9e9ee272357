"""A module trained whole beside the adapters: each adapter has its own copy, the original stays as it was.

Source: PEFT's modules_to_save.
"""

import copy
from typing import Any

from torch import nn


class TrainableCopy(nn.Module):
    """Runs the copy that belongs to the active adapter, or the original.

    Args:
        original: the module to train copies of; it is frozen.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original
        self.copies = nn.ModuleDict()
        self.trainable: dict[str, bool] = {}
        self.active: str | None = None
        self.enabled = True
        self.training = original.training

    @property
    def weight(self) -> Any:
        return self.running().weight

    @property
    def bias(self) -> Any:
        return getattr(self.running(), "bias", None)

    def add(self, name: str, trainable: bool) -> None:
        """Copy the original for this adapter."""
        self.copies[name] = copy.deepcopy(self.original)
        self.trainable[name] = trainable

    def remove(self, name: str) -> None:
        """Drop this adapter's copy, if it has one."""
        if name in self.copies:
            del self.copies[name], self.trainable[name]
        if self.active == name:
            self.active = None

    def activate(self, names: tuple[str, ...]) -> None:
        """Run the copy of the first of these adapters that has one; make it trainable if it is to be trained."""
        self.active = next((n for n in names if n in self.copies), None)
        self.original.requires_grad_(False)
        for name, module in self.copies.items():
            module.requires_grad_(self.trainable[name] and name == self.active)

    def running(self) -> nn.Module:
        """Return the module that the next forward calls."""
        return self.copies[self.active] if self.enabled and self.active is not None else self.original

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.running()(*args, **kwargs)
