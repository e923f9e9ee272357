"""Taking an adapter out of a model, and putting the original layers back where none is left."""

from torch import nn

from lora_core.adapt.checkpointing import keep_gradients_out
from lora_core.adapt.fast_path import settle_fast_paths
from lora_core.adapt.walk import parts, places, replace, unwrapped
from lora_core.layers.adapter import AdapterLayer
from lora_core.layers.trainable_copy import TrainableCopy


def withdraw(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter, and the adapted layers that have none left."""
    for part, names in places(model).items():
        if isinstance(part, (AdapterLayer, TrainableCopy)):
            part.remove(adapter_name)
            if not part.adapters:
                replace(model, names, part.replaced)
    tidy(model)


def tidy(model: nn.Module) -> None:
    """Undo what adapted layers asked of the modules around them, where none is left."""
    settle_fast_paths(model)
    if not parts(model):
        keep_gradients_out(unwrapped(model))
