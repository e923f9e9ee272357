"""Modules that match and cannot be adapted, and why."""

from torch import nn
from torch.nn.parameter import UninitializedParameter

from lora_core.adapt.kinds import SUPPORTED, adapted_kind, is_held_by_others
from lora_core.dtypes import FLOATS
from lora_core.errors import ConfigError, DtypeError
from lora_core.layers.adapter import AdapterLayer


def bypassed(model: nn.Module, name: str) -> bool:
    """Say whether this layer's forward is never called: attention reads out_proj's weight past it."""
    parent = model.get_submodule(name.rpartition(".")[0])
    return isinstance(parent, nn.MultiheadAttention)


def _looks_up_otherwise(module: nn.Module) -> bool:
    """Say whether an embedding has a forward of its own, as learned positions do; one that scales says by how much."""
    if not isinstance(module, nn.Embedding) or hasattr(module, "embed_scale"):
        return False
    return type(module).forward is not nn.Embedding.forward


def refuse_unsupported(model: nn.Module, name: str, module: nn.Module) -> None:
    if bypassed(model, name):
        raise ConfigError(
            f"{name} belongs to nn.MultiheadAttention, which uses its weight without calling it: an adapter there "
            "would do nothing; leave it out with exclude_modules"
        )
    if isinstance(getattr(module, "weight", None), UninitializedParameter):
        raise ConfigError(f"{name} is a {type(module).__name__} without a shape yet: run the model once first")
    kind = module if isinstance(module, AdapterLayer) else adapted_kind(module)
    dtype = getattr(getattr(module, "weight", None), "dtype", None)
    if kind is not None and dtype is not None and (dtype.is_floating_point or dtype.is_complex):
        if dtype not in FLOATS:
            raise DtypeError(
                f"{name} has a weight of {dtype}; want one of {', '.join(map(str, FLOATS))}, or a layer of "
                "quantize_model: leave it out with exclude_modules, or convert it"
            )
        if _looks_up_otherwise(module):
            raise ConfigError(
                f"{name} is a {type(module).__name__}, whose forward looks up other rows than it is given: an adapter "
                "would look up the wrong ones; leave it out with exclude_modules"
            )
    if is_held_by_others(module):
        raise ConfigError(
            f"{name} is a {type(module).__name__} whose weight another library has quantised: put PEFT's adapters on "
            "it and call lora_core.fuse(model), or load the model in 16 bits and call lora_core.quantize_model(model)"
        )
    if not isinstance(module, AdapterLayer) and adapted_kind(module) is None:
        if hasattr(module, "lora_A"):
            raise ConfigError(
                f"{name} has PEFT's adapters already: call lora_core.fuse(model) to run them faster, or take them out "
                "with PEFT's unload() first"
            )
        raise ConfigError(
            f"{name} is a {type(module).__name__}, which cannot be adapted; want one of {SUPPORTED}: name such "
            "layers in target_modules, or leave this one out with exclude_modules; or is this another model than the "
            "adapter is for?"
        )
