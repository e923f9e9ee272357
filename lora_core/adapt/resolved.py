"""Which fields a configuration is saved with, so that it chooses the same modules wherever it is loaded."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from lora_core.adapt.names import ALL_LINEAR, matches
from lora_core.adapt.walk import layers_of, original_modules, plain_name
from lora_core.layers.linear import LoraTransposedLinear
from lora_core.methods.lora import LoraConfig, pattern_matches


def resolved(model: nn.Module, adapter_name: str, config: LoraConfig) -> LoraConfig:
    """Name the targets where the rule that chose them may choose others when loading, here or in PEFT."""
    layers = layers_of(model, adapter_name)
    targets = [plain_name(n) for n in layers]
    if layers and all(isinstance(m, LoraTransposedLinear) for m in layers.values()):
        config = dataclasses.replace(config, fan_in_fan_out=True)
    config = dataclasses.replace(
        config,
        rank_pattern=_in_any_order(config.rank_pattern, targets),
        alpha_pattern=_in_any_order(config.alpha_pattern, targets),
    )
    wanted = config.target_modules
    if not targets:
        # PEFT refuses an empty list; null has it add pairs of its own, which start at zero
        return dataclasses.replace(config, target_modules=None)
    if config.layers_to_transform is not None:
        named = _whole_names(_original_names(model), targets)
        return dataclasses.replace(config, target_modules=named, layers_to_transform=None, layers_pattern=None)
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        return dataclasses.replace(config, target_modules=_shortest(_original_names(model), targets))
    return config


def _in_any_order(patterns: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return patterns that mean the same for these modules in whatever order they are written.

    The first that matches a module counts, and PEFT sorts them when it saves. So a pattern that is never the first goes
    where it says something else, and those that then still contradict each other give way to the modules' whole names.
    """
    matching = {name: [p for p in patterns if pattern_matches(p, name)] for name in names}
    first = {found[0] for found in matching.values() if found}
    shadowed = _contradicting(patterns, matching) - first
    kept = {p: value for p, value in patterns.items() if p not in shadowed}
    matching = {name: [p for p in found if p in kept] for name, found in matching.items()}
    split = _contradicting(kept, matching)
    whole = {f"^{re.escape(n)}": kept[found[0]] for n, found in matching.items() if split.intersection(found)}
    return {p: value for p, value in kept.items() if p not in split} | whole


def _contradicting(patterns: dict[str, Any], matching: dict[str, list[str]]) -> set[str]:
    """Return the patterns that match a module together with one of another value."""
    return {p for found in matching.values() if len({patterns[q] for q in found}) > 1 for p in found}


def _original_names(model: nn.Module) -> list[str]:
    return [plain_name(name) for name, _ in original_modules(model)]


def _shortest(names: list[str], targets: list[str]) -> list[str] | str:
    """Return the last parts of the targets' names if these choose no other module, else what names them whole."""
    suffixes = sorted({t.split(".")[-1] for t in targets})
    chosen = {n for n in names if matches(n, suffixes)}
    return suffixes if chosen == set(targets) else _whole_names(names, targets)


def _whole_names(names: list[str], targets: list[str]) -> list[str] | str:
    """Return the targets' names, or an expression for them where a list would choose others that end like one."""
    wanted = set(targets)
    if any(matches(name, wanted) for name in set(names) - wanted):
        return "|".join(re.escape(target) for target in targets)
    return targets
