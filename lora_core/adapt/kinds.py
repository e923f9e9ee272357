"""Which adapted layer stands in for which module."""

import sys

from torch import nn

from lora_core.layers.adapter import AdapterLayer
from lora_core.layers.conv import LoraConv
from lora_core.layers.embedding import LoraEmbedding
from lora_core.layers.linear import LoraLinear, LoraTransposedLinear
from lora_core.layers.nf4_linear import LoraNF4Linear, NF4Linear

KINDS: dict[type[nn.Module], type[AdapterLayer]] = {
    NF4Linear: LoraNF4Linear,
    nn.Linear: LoraLinear,
    nn.Embedding: LoraEmbedding,
    nn.Conv1d: LoraConv,
    nn.Conv2d: LoraConv,
}

SUPPORTED = "nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, transformers' Conv1D, NF4Linear"


def is_transposed_linear(module: nn.Module) -> bool:
    """Say whether this is transformers' Conv1D: a linear layer that stores W^T."""
    peer = sys.modules.get("transformers.pytorch_utils")
    return peer is not None and isinstance(module, peer.Conv1D)


def is_held_by_others(module: nn.Module) -> bool:
    """Say whether this is another library's linear layer with a quantised weight, such as bitsandbytes' Linear4bit."""
    return isinstance(module, nn.Linear) and not module.weight.is_floating_point()


def has_pefts_adapter(module: nn.Module) -> bool:
    """Say whether PEFT has put an adapter of any kind into this layer."""
    layer = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", ())
    return isinstance(module, layer)


def is_linear(module: nn.Module) -> bool:
    """Say whether "all-linear" means this module."""
    if isinstance(module, AdapterLayer):
        return isinstance(module, LoraLinear)
    return isinstance(module, (nn.Linear, NF4Linear)) or is_transposed_linear(module)


def adapted_kind(module: nn.Module) -> type[AdapterLayer] | None:
    """Return the class that adapts this module, or None."""
    if is_transposed_linear(module):
        return LoraTransposedLinear
    return next((layer for kind, layer in KINDS.items() if isinstance(module, kind)), None)
