"""Choosing the modules to adapt: name suffixes, a regular expression, or "all-linear". PEFT's rules.

A name matches a list when it is an entry or ends in "." + an entry; it matches a regular expression as a whole.
"""

import difflib
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from lora_core.adapt.kinds import SUPPORTED, adapted_kind, is_held_by_others, is_linear
from lora_core.adapt.saved import saves
from lora_core.adapt.walk import plain_name
from lora_core.errors import ConfigError, DtypeError, TargetNotFoundError
from lora_core.layers.adapter import AdapterLayer
from lora_core.layers.trainable_copy import TrainableCopy
from lora_core.methods.lora import LoraConfig, pattern_matches

ALL_LINEAR = "all-linear"

# what sequence classifiers call their head; PEFT leaves the same two out
CLASSIFIER_HEADS = ("classifier", "score")

SHOWN_CANDIDATES = 12
SHOWN_STACKED = 4

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def find_targets(model: nn.Module, config: LoraConfig) -> list[str]:
    """Return the names of the modules that config adapts, in the model's order.

    Raises:
        TargetNotFoundError: if none matches, listing names that could, closest first.
        ConfigError: if a module matches that cannot be adapted.
        DtypeError: if its weight is of a dtype that cannot be.
    """
    wanted = config.target_modules
    if wanted is None or len(wanted) == 0:
        raise ConfigError(
            "LoraConfig: target_modules is not set; give name suffixes such as ['q_proj', 'v_proj'], a regular "
            "expression, or 'all-linear'"
        )
    candidates = dict(_candidates(model))
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        head = output_head(model, config.task_type)
        found = [n for n, m in candidates.items() if is_linear(m) and m is not head and not _bypassed(model, n)]
        _warn_of_experts(candidates)
    else:
        found = [n for n in candidates if matches(plain_name(n), wanted)]
        _warn_of_unmatched("target_modules", wanted, candidates)
    found = [n for n in found if not _left_out(plain_name(n), config)]
    found = [n for n in found if _layer_chosen(plain_name(n), config)]
    _warn_of_unmatched("exclude_modules", config.exclude_modules or "", candidates)
    _warn_of_idle_patterns(config, found)
    if not found:
        raise TargetNotFoundError(_nothing_found(config, candidates))
    for name in found:
        _refuse_unsupported(model, name, candidates[name])
    return found


def matches(name: str, wanted: Sequence[str] | str) -> bool:
    """Say whether a module name is one of the wanted."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == w or name.endswith(f".{w}") for w in wanted)


def output_head(model: nn.Module, task_type: str | None = None) -> nn.Module | None:
    """Return the layer that turns hidden states into scores, which "all-linear" leaves out.

    A transformers model says which it is. Elsewhere it is the module called lm_head, or the last linear layer if it
    leads from an embedding's dimension to its vocabulary.
    """
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if isinstance(head, nn.Module):
        return head
    if task_type == "SEQ_CLS":
        return next(
            (getattr(model, n) for n in CLASSIFIER_HEADS if isinstance(getattr(model, n, None), nn.Module)), None
        )
    linear = [(n, m) for n, m in _candidates(model) if is_linear(m)]
    for name, module in linear:
        if name.split(".")[-1] == "lm_head":
            return module
    tables = {m.weight.shape for _, m in _candidates(model) if isinstance(m, nn.Embedding)}
    last: Any = linear[-1][1] if linear else None
    if last is not None and last.weight.shape in tables:
        return cast(nn.Module, last)
    return None


def _candidates(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Walk the modules that were there before any adapter: nothing inside an adapted layer or a trainable copy."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or (inside and name.startswith(inside)):
            continue
        yield name, module
        if isinstance(module, (AdapterLayer, TrainableCopy)):
            inside = (*inside, name + ".")


def _bypassed(model: nn.Module, name: str) -> bool:
    """Say whether this layer's forward is never called: attention reads out_proj's weight past it."""
    parent = model.get_submodule(name.rpartition(".")[0])
    return isinstance(parent, nn.MultiheadAttention)


def _left_out(name: str, config: LoraConfig) -> bool:
    saved = config.modules_to_save or ()
    if any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in saved):
        return True
    parts = name.split(".")
    if saved and any(saves(".".join(parts[:i]), saved) for i in range(1, len(parts) + 1)):
        return True
    return bool(config.exclude_modules) and matches(name, config.exclude_modules or ())


def _layer_chosen(name: str, config: LoraConfig) -> bool:
    """Apply layers_to_transform: the first number in the name, or the one after layers_pattern.

    Not to a module that target_modules gives by its whole name; and where a list of layers is the model's own child,
    the first number behind another name goes first: both as in PEFT.
    """
    chosen = config.layers_to_transform
    if chosen is None or (not isinstance(chosen, int) and len(chosen) == 0):
        return True
    if not isinstance(config.target_modules, str) and name in (config.target_modules or ()):
        return True
    if config.layers_pattern:
        patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
        hits = [re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", name) for p in patterns]
    else:
        hits = [re.match(expression, name) for expression in (r".*?\.[^.]*\.(\d+)\.", r"[^.]*\.(\d+)\.")]
    hit = next((h for h in hits if h), None)
    return hit is not None and int(hit.group(1)) in ([chosen] if isinstance(chosen, int) else chosen)


def _warn_of_unmatched(field: str, wanted: Sequence[str] | str, candidates: dict[str, nn.Module]) -> None:
    if isinstance(wanted, str):
        return
    idle = [w for w in wanted if not any(matches(plain_name(n), [w]) for n in candidates)]
    # where nothing at all is targeted, an error follows
    if idle and (field != "target_modules" or len(idle) < len(wanted)):
        warnings.warn(f"{field}: no module is called {', '.join(map(repr, idle))}", UserWarning, stacklevel=5)


def _warn_of_idle_patterns(config: LoraConfig, found: list[str]) -> None:
    names = [plain_name(name) for name in found]
    for field, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        idle = [p for p in patterns if not any(pattern_matches(p, name) for name in names)]
        if idle and found:
            told = ", ".join(map(repr, idle))
            warnings.warn(f"{field}: no adapted module matches {told}", UserWarning, stacklevel=5)


def _warn_of_experts(candidates: dict[str, nn.Module]) -> None:
    """Warn of weights that "all-linear" does not reach: a mixture's experts in one tensor of three dimensions."""
    stacked = [
        f"{name}.{key}"
        for name, module in candidates.items()
        if adapted_kind(module) is None
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() == 3 and parameter.is_floating_point()
    ]
    if stacked:
        more = f" and {len(stacked) - SHOWN_STACKED} more" if len(stacked) > SHOWN_STACKED else ""
        warnings.warn(
            f"target_modules 'all-linear' leaves stacked weights out, which are in no linear layer: "
            f"{', '.join(stacked[:SHOWN_STACKED])}{more}",
            UserWarning,
            stacklevel=5,
        )


def _nothing_found(config: LoraConfig, candidates: dict[str, nn.Module]) -> str:
    able = [n for n, m in candidates.items() if isinstance(m, AdapterLayer) or adapted_kind(m)]
    suffixes = list(dict.fromkeys(n.split(".")[-1] if not n.split(".")[-1].isdigit() else n for n in able))
    wanted = config.target_modules or ""
    asked = [wanted] if isinstance(wanted, str) else list(wanted)

    def distance(suffix: str) -> float:
        return -max((difflib.SequenceMatcher(None, suffix, w).ratio() for w in asked), default=0.0)

    closest = sorted(suffixes, key=distance)[:SHOWN_CANDIDATES]
    limits = [
        f"{key}={value!r}"
        for key, value in (
            ("exclude_modules", config.exclude_modules),
            ("layers_to_transform", config.layers_to_transform),
            ("layers_pattern", config.layers_pattern),
        )
        if value
    ]
    limited = f" with {', '.join(limits)}" if limits else ""
    told = f"no module matches target_modules={config.target_modules!r}{limited}"
    if isinstance(wanted, str) and wanted in suffixes:
        return f"{told}: a string is a regular expression for whole names; write [{wanted!r}] for all that end so"
    if limits and (wanted == ALL_LINEAR or any(matches(n, wanted) for n in able)):
        numbers = sorted({int(part) for n in able for part in n.split(".") if part.isdigit()})
        layers = (
            f"; the layers here are {_ranges(numbers)}" if numbers and config.layers_to_transform is not None else ""
        )
        return f"{told}: these limits leave nothing of what target_modules matches{layers}; widen them"
    return f"{told}; want one of: {', '.join(closest) or 'none, this model has no layer that can be adapted'}"


def _ranges(numbers: list[int]) -> str:
    """Return rising numbers as text, runs shortened: "0 to 31"."""
    if numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 1:
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def _looks_up_otherwise(module: nn.Module) -> bool:
    """Say whether an embedding has a forward of its own, as learned positions do; one that scales says by how much."""
    if not isinstance(module, nn.Embedding) or hasattr(module, "embed_scale"):
        return False
    return type(module).forward is not nn.Embedding.forward


def _refuse_unsupported(model: nn.Module, name: str, module: nn.Module) -> None:
    if _bypassed(model, name):
        raise ConfigError(
            f"{name} belongs to nn.MultiheadAttention, which uses its weight without calling it: an adapter there "
            "would do nothing; leave it out with exclude_modules"
        )
    if isinstance(getattr(module, "weight", None), UninitializedParameter):
        raise ConfigError(f"{name} is a {type(module).__name__} without a shape yet: run the model once first")
    kind = module if isinstance(module, AdapterLayer) else adapted_kind(module)
    dtype = getattr(getattr(module, "weight", None), "dtype", None)
    if kind is not None and dtype is not None and (dtype.is_floating_point or dtype.is_complex):
        if dtype not in FLOATING:
            raise DtypeError(
                f"{name} has a weight of {dtype}; want one of {', '.join(map(str, FLOATING))}, or a layer of "
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
