"""Where this library and PEFT compute different things from the same adapter's file."""

import warnings

from torch import nn

from lora_core.adapt.walk import places
from lora_core.layers.adapter import AdapterLayer
from lora_core.layers.conv import LoraConv


def warn_where_peft_differs(model: nn.Module, adapter_name: str) -> None:
    """Warn of adapted layers that PEFT, given the same file, runs otherwise."""
    for module, names in places(model).items():
        if not isinstance(module, AdapterLayer) or adapter_name not in module.adapters:
            continue
        if len(names) > 1:
            _warn(f"{names[0]} is {', '.join(names[1:])} too, one module: PEFT adapts it under its first name alone")
        if isinstance(module, LoraConv) and any(s != 1 for s in module.base_layer.dilation):
            _warn(
                f"{names[0]} has a dilation of {module.base_layer.dilation}: PEFT runs A without, and fails or differs"
            )
        if isinstance(module, LoraConv) and module.base_layer.padding_mode != "zeros":
            _warn(
                f"{names[0]} pads by {module.base_layer.padding_mode!r}: PEFT pads with zeros on the way to A, and "
                "gives another output near the borders"
            )


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=4)
