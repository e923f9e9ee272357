"""Choosing the modules to train whole (modules_to_save), and the heads that a task's models train whole."""

import dataclasses
from collections.abc import Sequence

from torch import nn

from lora_core.adapt.walk import Ties, original_modules, outermost, plain_name, trainable_copies
from lora_core.adapt.warn import warn
from lora_core.errors import ConfigError, TargetNotFoundError
from lora_core.layers.adapter import AdapterLayer
from lora_core.layers.trainable_copy import TrainableCopy
from lora_core.methods.lora import LoraConfig
from lora_core.quant import QuantizedWeight

# What transformers calls the heads of classifiers and of question answering, which start from random values. PEFT
# trains them whole for these task types. Source: PEFT 0.21.2, PeftModelForSequenceClassification and its siblings.
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

# Containers without a forward of their own: a copy could not be called.
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def saves(name: str, wanted: Sequence[str]) -> bool:
    """Say whether modules_to_save means a module: PEFT takes every name that ends so, with a dot before it or not."""
    return any(name.endswith(w) for w in wanted)


def lies_in_saved(name: str, config: LoraConfig) -> bool:
    """Say whether a module, or a tensor, is or lies inside a module that modules_to_save means."""
    wanted = config.modules_to_save
    parts = name.split(".")
    return bool(wanted) and any(saves(".".join(parts[:i]), wanted or ()) for i in range(1, len(parts) + 1))


def with_task_heads(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """Add to modules_to_save the heads that this model has for the configuration's task_type."""
    heads = TASK_HEADS.get(config.task_type or "", ())
    named = list(config.modules_to_save or ())
    names = [plain_name(n) for n, _ in model.named_modules()]
    missing = [h for h in heads if h not in named and any(n.split(".")[-1] == h for n in names)]
    return dataclasses.replace(config, modules_to_save=[*named, *missing]) if missing else config


def find_saved(model: nn.Module, config: LoraConfig) -> list[str]:
    """Return the names of the modules trained whole, outermost ones only.

    Raises:
        ConfigError: if one cannot be: it has an adapter's layer or trained module inside, or lies inside one, or is
            quantised, or a container.
        TargetNotFoundError: if no module has one of the names.
    """
    wanted = config.modules_to_save
    if not wanted:
        return []
    _refuse_inner(model, wanted)
    modules = dict(original_modules(model))
    found = outermost(n for n in modules if saves(plain_name(n), wanted))
    for name in found:
        _refuse(name, modules[name])
    for word in wanted:
        if not any(saves(plain_name(n), [word]) for n in modules):
            raise TargetNotFoundError(
                f"modules_to_save: no module is called {word!r}; the last parts of names here are "
                f"{', '.join(sorted({n.split('.')[-1] for n in modules}))}"
            )
        if not any(saves(plain_name(n), [word]) for n in found):
            warn(
                f"modules_to_save: what is called {word!r} lies inside modules that are trained whole, as part of them"
            )
    _warn_of_tied(model, found)
    return found


def _refuse_inner(model: nn.Module, wanted: Sequence[str]) -> None:
    """Raise ConfigError if one of these lies inside a module that another adapter trains whole."""
    for outer, copies in trainable_copies(model).items():
        for inner, _ in copies.original.named_modules():
            if inner and saves(plain_name(f"{outer}.{inner}"), wanted) and not saves(plain_name(outer), wanted):
                raise ConfigError(
                    f"modules_to_save names {outer}.{inner}, and adapter {next(iter(copies.copies))!r} trains {outer} "
                    f"whole: name {outer} here too, or delete that adapter first"
                )


def _refuse(name: str, module: nn.Module) -> None:
    """Raise ConfigError if a module cannot be trained whole."""
    inside = [m for m in module.modules() if m is not module]
    if isinstance(module, AdapterLayer) or any(isinstance(m, (AdapterLayer, TrainableCopy)) for m in inside):
        raise ConfigError(
            f"modules_to_save names {name}, where an adapter has a layer or a module of its own: choose one of the "
            "two, or delete that adapter first"
        )
    if isinstance(module, CONTAINERS):
        raise ConfigError(
            f"modules_to_save names {name}, a {type(module).__name__}, which is never called itself: name the modules "
            "inside it"
        )
    quantised = any(isinstance(m, QuantizedWeight) for m in module.modules())
    if not isinstance(module, TrainableCopy) and (
        quantised or not all(p.is_floating_point() or p.is_complex() for p in module.parameters())
    ):
        raise ConfigError(
            f"modules_to_save names {name}, which is quantised and so cannot be trained whole: leave it out of "
            "quantising (quantize_model's skip_modules), or adapt it with target_modules"
        )


def _warn_of_tied(model: nn.Module, names: list[str]) -> None:
    ties = Ties(model)
    for name in names:
        for parameter_name, parameter in model.get_submodule(name).named_parameters():
            others = [o for o in ties.of(parameter) if not o.startswith(name + ".")]
            if others:
                warn(
                    f"modules_to_save: {name}.{parameter_name} is tied to {', '.join(others)}; the trained copy is not"
                )
