"""Finding and replacing modules inside a model."""

from collections.abc import Iterable

from torch import nn

from lora_core.errors import AdapterError
from lora_core.layers.adapter import AdapterLayer
from lora_core.layers.trainable_copy import TrainableCopy


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """Return the adapted layers of a model by module name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, AdapterLayer)}


def trainable_copies(model: nn.Module) -> dict[str, TrainableCopy]:
    """Return the modules trained whole (modules_to_save) by module name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, TrainableCopy)}


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of the adapters a model has, in the order they were added."""
    seen: dict[str, None] = {}
    for layer in adapter_layers(model).values():
        seen.update(dict.fromkeys(layer.adapters))
    for copies in trainable_copies(model).values():
        seen.update(dict.fromkeys(copies.copies.keys()))
    return list(seen)


def require_adapters(model: nn.Module, names: Iterable[str]) -> None:
    """Raise AdapterError unless the model has every one of these adapters."""
    have = adapter_names(model)
    missing = [name for name in names if name not in have]
    if missing:
        raise AdapterError(
            f"no adapter named {missing[0]!r}: the model has {have or 'none'}; add it with add_adapter or load_adapter"
        )


def require_unmerged(model: nn.Module, verb: str) -> None:
    """Raise AdapterError if an adapter is merged into the weights."""
    merged = next((layer.merged.names for layer in adapter_layers(model).values() if layer.merged), None)
    if merged:
        raise AdapterError(
            f"cannot {verb} while {list(merged)} is merged into the weights: call unmerge_adapter(model) first"
        )


def places(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return every module with all the names it is reached by; a module used twice has two."""
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(module, []).append(name)
    return found


def replace(model: nn.Module, names: Iterable[str], new: nn.Module) -> None:
    """Put a module at each of these names."""
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)


def tied_to(model: nn.Module) -> dict[int, list[str]]:
    """Return, by parameter id, the full names of each parameter that more than one module owns."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{name}.{key}" if name else key)
    return {key: names for key, names in owners.items() if len(names) > 1}
