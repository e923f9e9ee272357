"""A module trained whole beside the adapters: each adapter has its own copy, the original stays as it was.

Source: PEFT's modules_to_save.
"""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lora_core.layers.merged import Merged
from lora_core.layers.off import Off

# never the running module's: the wrapper's own, and where accelerate keeps a module's hook and the forward it replaced
OWN = frozenset(("original", "copies", "adapters", "merged", "chosen", "active", "off", "_hf_hook", "_old_forward"))


@dataclass
class Copied:
    """What one adapter is at one module trained whole, apart from its copy.

    Args:
        config: the configuration it was made from; kept to be saved.
        trainable: whether activating it makes the copy require gradients.
    """

    config: Any
    trainable: bool


class TrainableCopy(nn.Module):
    """Runs the copy that belongs to the active adapter, or the original.

    Args:
        original: the module to train copies of; it is frozen.
    """

    # read by transformers' save_pretrained: where this is another module's parameter too, one name of it is enough
    _tied_weights_keys: ClassVar[dict[str, None]] = {"original.weight": None}

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original
        self.copies = nn.ModuleDict().train(original.training)
        self.adapters: dict[str, Copied] = {}
        self.merged: Merged | None = None
        # what activate was given last, and of that the one that has a copy
        self.chosen: tuple[str, ...] = ()
        self.active: str | None = None
        self.off = Off()
        self.training = original.training

    def __getattr__(self, name: str) -> Any:
        """Read what this wrapper lacks from the module that runs: weight, out_features, padding_idx, ..."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or name in OWN:
                raise
            return getattr(self.running(), name)

    @property
    def replaced(self) -> nn.Module:
        """The module that this one stands in for."""
        return self.original

    def add(self, name: str, adapter: Copied) -> None:
        """Copy the original for this adapter."""
        # first: stopped half way, there is no copy without its adapter
        self.adapters[name] = adapter
        self.copies[name] = copy.deepcopy(self.original)

    def remove(self, name: str) -> None:
        """Drop this adapter's copy, if it has one."""
        if self.active == name:
            self.active = None
        if name in self.copies:
            del self.copies[name]
        self.adapters.pop(name, None)

    def activate(self, names: tuple[str, ...]) -> None:
        """Run the copy of the one of these adapters that has one; make it trainable if it is to be trained."""
        self.chosen = names
        self.active = next((n for n in names if n in self.copies), None)
        self.original.requires_grad_(False)
        for name, module in self.copies.items():
            module.requires_grad_(self.adapters[name].trainable and name == self.active and self.merged is None)

    def running(self) -> nn.Module:
        """Return the module that the next forward calls: of what is merged the copy, as long as it is."""
        if self.off.blocks:
            return self.original
        return self.module_of(self.merged.names if self.merged else (self.active,))

    def module_of(self, names: tuple[str | None, ...]) -> nn.Module:
        """Return the copy of the one of these adapters that has one, or the original."""
        return next((self.copies[n] for n in names if n is not None and n in self.copies), self.original)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.running()(*args, **kwargs)
