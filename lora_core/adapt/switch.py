"""set_adapter: which adapters a model runs and trains."""

from collections.abc import Sequence

from torch import nn

from lora_core.adapt.biases import trained_biases
from lora_core.adapt.walk import (
    adapter_names,
    parts,
    require_adapters,
    require_editable,
    trainable_copies,
)
from lora_core.errors import AdapterError
from lora_core.methods.lora import LoraConfig


def set_adapter(model: nn.Module, adapter_name: str | Sequence[str]) -> None:
    """Run these adapters and no others, and freeze all else.

    Of the active adapters those are trained that were added for training, with the modules and biases that their
    configuration asks for.

    Args:
        model: a model with adapters.
        adapter_name: a name, or several whose updates are added; an empty list runs the base model.
    Raises:
        AdapterError: if there is no such adapter, one is merged, adapters are disabled for a while, or two of these
            train one module as a whole.
    """
    names = chosen_names(adapter_name)
    require_adapters(model, names)
    require_editable(model, "switch adapters")
    refuse_rivals(model, names)
    activate(model, names)


def activate(model: nn.Module, names: Sequence[str]) -> None:
    """Run these adapters and no others, and freeze all else; stopped half way, those before run."""
    before = active_names(model)
    try:
        _activate(model, names)
    except BaseException:
        _activate(model, before)
        raise


def _activate(model: nn.Module, names: Sequence[str]) -> None:
    model.requires_grad_(False)
    for part in parts(model).values():
        part.activate(tuple(names))
    for name, config in trained_configs(model, names).items():
        for _, bias in trained_biases(model, name, config.bias):
            bias.requires_grad_(True)


def chosen_names(given: str | Sequence[str]) -> tuple[str, ...]:
    """Return one name, or several, as a tuple.

    Raises:
        AdapterError: if these are no names, or one comes twice, which would add its update twice.
    """
    if isinstance(given, str):
        return (given,)
    if not isinstance(given, Sequence) or not all(isinstance(name, str) for name in given):
        raise AdapterError(f"adapter names {given!r}: want the name of an adapter, or a list of names")
    twice = [name for name in given if given.count(name) > 1]
    if twice:
        raise AdapterError(f"adapter {twice[0]!r} is named twice in {list(given)}: name each once")
    return tuple(given)


def refuse_rivals(model: nn.Module, names: Sequence[str]) -> None:
    """Raise AdapterError if several of these adapters train one module as a whole: only one's copy could run."""
    for where, module in trainable_copies(model).items():
        rivals = [name for name in names if name in module.copies]
        if len(rivals) > 1:
            raise AdapterError(
                f"adapters {rivals[0]!r} and {rivals[1]!r} each have a copy of {where!r}, in modules_to_save, of which "
                "only one can run: choose one of them"
            )


def active_names(model: nn.Module) -> tuple[str, ...]:
    """Return the adapters that a model runs, in the order in which they were chosen."""
    chosen = dict.fromkeys(name for part in parts(model).values() for name in part.chosen)
    have = adapter_names(model)
    return tuple(name for name in chosen if name in have)


def trained_configs(model: nn.Module, names: Sequence[str]) -> dict[str, LoraConfig]:
    """Return the configurations of those adapters, of the named, that are being trained, by name."""
    return {
        name: part.adapters[name].config
        for part in parts(model).values()
        for name in names
        if name in part.adapters and part.adapters[name].trainable
    }
