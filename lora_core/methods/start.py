"""How A and B of an adapter start: B at zero, at random, or, by PiSSA and OLoRA, as a part of the weight."""

import math

import torch
from torch import nn

from lora_core.errors import ConfigError, NonFiniteError
from lora_core.layers.adapter import AdapterLayer, Start
from lora_core.layers.embedding import LoraEmbedding
from lora_core.layers.linear import LoraTransposedLinear
from lora_core.methods import olora, pissa

# kaiming_uniform(a = sqrt 5) is U(-1/sqrt(K), 1/sqrt(K)), nn.Linear's own start; loralib and PEFT use it for A
KAIMING_SLOPE = math.sqrt(5)


@torch.no_grad()
def initialise(layer: AdapterLayer, name: str, how: bool | str) -> None:
    """Fill an adapter's matrices in place; `take_start` then changes the base weight, where the start asks for it.

    Args:
        layer: the adapted layer.
        name: the adapter.
        how: LoraConfig.init_lora_weights.
    """
    lora_a, lora_b = layer.lora_a[name], layer.lora_b[name]
    if isinstance(how, str) and starts_from_weight(how):
        split = olora.split if how == "olora" else pissa.splitter(how)
        start_from_weight(layer, name, split)
    elif isinstance(layer, LoraEmbedding):
        nn.init.normal_(lora_b)
        nn.init.normal_(lora_a) if how is False else nn.init.zeros_(lora_a)
    else:
        if how == "gaussian":
            nn.init.normal_(lora_a, std=1 / layer.adapters[name].rank)
        else:
            nn.init.kaiming_uniform_(lora_a, a=KAIMING_SLOPE)
        nn.init.kaiming_uniform_(lora_b, a=KAIMING_SLOPE) if how is False else nn.init.zeros_(lora_b)


def start_from_weight(layer: AdapterLayer, name: str, split: pissa.Split) -> None:
    """Start A and B as a low-rank part of W, which `take_start` takes out of W, so that the sum stays W."""
    adapter = layer.adapters[name]
    weight = layer.original_weight()
    if weight.dim() != 2 or isinstance(layer, LoraEmbedding):
        raise ConfigError(
            f"init_lora_weights={adapter.config.init_lora_weights!r} splits the weight of a linear layer; "
            f"this is a {type(layer.base_layer).__name__}: use True or 'gaussian' there"
        )
    if weight.is_meta:
        raise ConfigError(
            f"init_lora_weights={adapter.config.init_lora_weights!r} needs the weight's values, which a model on the "
            "meta device does not have: load the weights first, or use True"
        )
    reason = layer.why_unmergeable()
    if reason:
        raise ConfigError(
            f"init_lora_weights={adapter.config.init_lora_weights!r} takes a part out of the weight of a "
            f"{type(layer.base_layer).__name__}, and {reason}: use True or 'gaussian' there"
        )
    if not weight.isfinite().all():
        raise NonFiniteError(
            f"init_lora_weights={adapter.config.init_lora_weights!r} splits a weight that holds NaN or infinity: "
            "repair it, or load the base again"
        )
    lora_a, lora_b = layer.lora_a[name], layer.lora_b[name]
    matrix = weight.to(torch.promote_types(weight.dtype, torch.float32))
    a, b = split(matrix.T if isinstance(layer, LoraTransposedLinear) else matrix, adapter.rank, adapter.scaling)
    if a.shape[0] < adapter.rank:
        raise ConfigError(
            f"init_lora_weights={adapter.config.init_lora_weights!r} at rank {adapter.rank} on a weight of shape "
            f"{tuple(weight.shape)}: want a rank of at most {a.shape[0]}"
        )
    lora_a.copy_(a)
    lora_b.copy_(b)


def starts_from_weight(how: bool | str) -> bool:
    """Say whether an init_lora_weights takes a part out of the base weight."""
    return isinstance(how, str) and how != "gaussian"


@torch.no_grad()
def take_start(layer: AdapterLayer, name: str) -> None:
    """Take the adapter's start out of the base weight: W <- W - s B A.

    The start is kept beside the adapter: without it neither the original weight nor an adapter for it could be had.
    """
    lora_a, lora_b = layer.lora_a[name].detach(), layer.lora_b[name].detach()
    with layer.unchanged_on_failure():
        layer.shift_weight(lora_a, lora_b, -layer.adapters[name].scaling)
        layer.lora_start[name] = Start(lora_a.clone(), lora_b.clone()).train(layer.training)
