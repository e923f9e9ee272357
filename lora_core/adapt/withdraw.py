"""Taking an adapter out of a model, and putting the original layers back where none is left."""

from torch import nn

from lora_core.adapt.fast_path import allow_fast_path
from lora_core.adapt.walk import adapter_layers, places, replace
from lora_core.layers.adapter import AdapterLayer
from lora_core.layers.trainable_copy import TrainableCopy


def withdraw(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter, and the adapted layers that have none left."""
    where = places(model)
    for module, names in where.items():
        if isinstance(module, AdapterLayer):
            if adapter_name in module.adapters:
                module.remove(adapter_name)
            if not module.adapters:
                replace(model, names, module.base_layer)
        elif isinstance(module, TrainableCopy):
            module.remove(adapter_name)
            if not module.copies:
                replace(model, names, module.original)
    allow_fast_paths(model)


def allow_fast_paths(model: nn.Module) -> None:
    """Let encoder layers read their weights directly again, once a model has no adapted layer."""
    if not adapter_layers(model):
        for module in model.modules():
            allow_fast_path(module)
