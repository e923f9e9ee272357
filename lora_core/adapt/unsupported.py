"""Modules that match and cannot be adapted, and why."""

import ast
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter

from lora_core.adapt.bypassed import bypassed
from lora_core.adapt.kinds import SUPPORTED, adapted_kind, has_pefts_adapter, is_held_by_others
from lora_core.adapt.source import returns_several, source_of
from lora_core.dtypes import FLOATS
from lora_core.errors import AdapterError, ConfigError, DtypeError
from lora_core.layers.adapter import AdapterLayer


def refuse_peft(model: nn.Module, verb: str) -> None:
    """Raise AdapterError if PEFT has put adapters of its own into the model."""
    name = next((name for name, module in model.named_modules() if has_pefts_adapter(module)), None)
    if name is not None:
        raise AdapterError(
            f"cannot {verb}: {name} has PEFT's adapters; call lora_core.fuse(model) to run them faster, or take them "
            "out with PEFT's unload() or merge_and_unload() first"
        )


def refuse_unshaped(model: nn.Module, verb: str) -> None:
    """Raise ConfigError if a module of the model waits for its first input to give its parameters a shape."""
    for name, module in model.named_modules():
        if any(isinstance(parameter, UninitializedParameter) for parameter in module._parameters.values()):
            raise ConfigError(
                f"cannot {verb}: {name} is a {type(module).__name__} without a shape yet: run the model once first"
            )


def _convolves_otherwise(module: nn.Module) -> bool:
    """Say whether a convolution's class has a forward of its own: it may pad, or compute its kernel."""
    own = next((kind.forward for kind in (nn.Conv1d, nn.Conv2d) if isinstance(module, kind)), None)
    return own is not None and type(module).forward is not own and not _only_delegates(type(module).forward)


def _only_delegates(forward: Any) -> bool:
    """Say whether all that a forward does is return super().forward(x)."""
    found = source_of(forward)
    if found is None or len(found.args.args) != 2:
        return False
    return ast.unparse(found.body[-1]) == f"return super().forward({found.args.args[1].arg})" and len(found.body) == 1


def _looks_up_otherwise(module: nn.Module) -> bool:
    """Say whether an embedding has a forward of its own, as learned positions do; one that scales says by how much."""
    if not isinstance(module, nn.Embedding) or hasattr(module, "embed_scale"):
        return False
    return type(module).forward is not nn.Embedding.forward


def gives_several(module: nn.Module) -> bool:
    """Say whether a linear layer's class has a forward of its own that returns several results, as a router's does."""
    forward = type(module).forward
    return isinstance(module, nn.Linear) and forward is not nn.Linear.forward and returns_several(forward)


def refuse_unsupported(model: nn.Module, name: str, module: nn.Module) -> None:
    if bypassed(model, name):
        owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
        raise ConfigError(
            f"{name} belongs to a {owner}, which uses its weight without calling it: an adapter there would do "
            "nothing; leave it out with exclude_modules"
        )
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
        if gives_several(module):
            raise ConfigError(
                f"{name} is a {type(module).__name__}, whose forward returns several results, to which no update can "
                "be added: leave it out with exclude_modules"
            )
        if _convolves_otherwise(module):
            raise ConfigError(
                f"{name} is a {type(module).__name__}, whose forward is not that of the convolution it derives from: "
                "an adapter would add another one's output; leave it out with exclude_modules"
            )
    if is_held_by_others(module):
        raise ConfigError(
            f"{name} is a {type(module).__name__} whose weight another library has quantised: put PEFT's adapters on "
            "it and call lora_core.fuse(model), or load the model in 16 bits and call lora_core.quantize_model(model)"
        )
    if kind is None:
        raise ConfigError(
            f"{name} is a {type(module).__name__}, which cannot be adapted; want one of {SUPPORTED}: name such "
            "layers in target_modules, or leave this one out with exclude_modules; or is this another model than the "
            "adapter is for?"
        )
