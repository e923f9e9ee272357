"""Where this library and PEFT compute different things from the same adapter's file."""

import sys
from typing import Any

from torch import nn

from lora_core.adapt.walk import places
from lora_core.adapt.warn import warn
from lora_core.layers.adapter import AdapterLayer
from lora_core.layers.conv import LoraConv
from lora_core.layers.embedding import LoraEmbedding

# of mixtures of experts by how transformers renames their weights: names that PEFT 0.21 takes for those of experts in
# every layer, and gives adapters in stacked weights instead
EXPERTS = {"mixtral": ("gate", "w1", "w2", "w3"), "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj")}


def warn_where_peft_differs(model: nn.Module, adapter_name: str) -> None:
    """Warn of adapted layers that PEFT, given the same file, runs otherwise."""
    taken = _taken_for_experts(model)
    for module, names in places(model).items():
        if not isinstance(module, AdapterLayer) or adapter_name not in module.adapters:
            continue
        if len(names) > 1:
            warn(f"{names[0]} is {', '.join(names[1:])} too, one module: PEFT adapts it under its first name alone")
        if names[0].rpartition(".")[2] in taken:
            warn(f"{names[0]} is no expert, and PEFT takes its name for one: it drops the adapter here")
        if isinstance(module, LoraEmbedding) and module.base_layer.max_norm is not None:
            warn(f"{names[0]} has max_norm={module.base_layer.max_norm}: PEFT changes A by it as it runs, too")
        if isinstance(module, LoraConv) and any(s != 1 for s in module.base_layer.dilation):
            warn(
                f"{names[0]} has a dilation of {module.base_layer.dilation}: PEFT runs A without, and fails or differs"
            )
        if isinstance(module, LoraConv) and module.base_layer.padding_mode != "zeros":
            warn(
                f"{names[0]} pads by {module.base_layer.padding_mode!r}: PEFT pads with zeros on the way to A, and "
                "gives another output near the borders"
            )


def _taken_for_experts(model: nn.Module) -> tuple[str, ...]:
    """Return the last names of layers that PEFT takes for experts' in this model."""
    config: Any = getattr(model, "config", None)
    renamed = getattr(sys.modules.get("transformers.conversion_mapping"), "_MODEL_TO_CONVERSION_PATTERN", {})
    kind = renamed.get(getattr(config, "model_type", None))
    return EXPERTS.get(kind, ()) if isinstance(kind, str) else ()
