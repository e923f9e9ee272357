"""What a configuration names and does not choose: warnings, and the message where it chooses nothing."""

import difflib
from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from lora_core.adapt.kinds import adapted_kind
from lora_core.adapt.names import ALL_LINEAR, endings, first_few, matches
from lora_core.adapt.walk import outermost, plain_name
from lora_core.adapt.warn import warn
from lora_core.layers.adapter import AdapterLayer
from lora_core.methods.lora import LoraConfig, pattern_matches

SHOWN_CANDIDATES = 12
SHOWN_NAMES = 4
# why layers are told of
BYPASSED = (
    "in training their module may work with the weight itself and not call the layer, as where kernels of its own run"
)
SEVERAL = "the forward returns several results, to which no update can be added"


def warn_of_unmatched(field: str, wanted: Sequence[str] | str, candidates: dict[str, nn.Module]) -> None:
    if isinstance(wanted, str):
        return
    named = {ending for name in candidates for ending in endings(plain_name(name))}
    idle = [w for w in wanted if w not in named]
    # where nothing at all is targeted, an error follows
    if idle and (field != "target_modules" or len(idle) < len(wanted)):
        warn(f"{field}: no module is called {', '.join(map(repr, idle))}")


def warn_of_idle_patterns(config: LoraConfig, found: list[str]) -> None:
    names = [plain_name(name) for name in found]
    for field, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        idle = [p for p in patterns if not any(pattern_matches(p, name) for name in names)]
        if idle and found:
            told = ", ".join(map(repr, idle))
            warn(f"{field}: no adapted module matches {told}")


def warn_of_inner(found: list[str]) -> None:
    """Warn of layers that are chosen and lie inside another chosen one, which is adapted as a whole."""
    inner = sorted(set(found).difference(outermost(found)))
    if inner:
        warn(
            f"left out: {', '.join(inner)}, inside a layer that is adapted itself; to adapt the inner ones instead, "
            "leave that layer out with exclude_modules"
        )


def warn_of(what: str, names: Iterable[str], why: str) -> None:
    """Warn of layers, if there are any, which target_modules means and to which something happens."""
    told = sorted(names)
    if told:
        warn(f"target_modules: {what} {first_few(told, SHOWN_NAMES)}: {why}")


def stacked_weights(modules: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield weights of three dimensions, as those of experts, that are in no layer of PyTorch's, with their names."""
    for name, module in modules.items():
        # what a weight is computed of is none that a layer has
        if type(module).__module__.startswith("torch.nn.") or "parametrizations" in name.split("."):
            continue
        for key, parameter in module._parameters.items():
            if parameter is None or parameter.dim() != 3 or not parameter.is_floating_point():
                continue
            # vectors by which tokens are mixed, or that stand for one, are no stack of matrices
            if parameter.shape[0] > 1 and min(parameter.shape[1:]) > 1:
                yield f"{name}.{key}" if name else key, parameter


def warn_of_experts(wanted: Sequence[str] | str, candidates: dict[str, nn.Module]) -> None:
    """Warn of weights that target_modules means and does not reach: experts in one tensor of three dimensions."""
    stacked = [name for name, _ in stacked_weights(candidates) if _means(wanted, name.rpartition(".")[2])]
    if stacked:
        warn(
            f"target_modules leaves stacked weights out, which are in no linear layer: "
            f"{first_few(stacked, SHOWN_NAMES)}"
        )


def _means(wanted: Sequence[str] | str, stacked: str) -> bool:
    """Say whether one of these names is a stacked weight's, or that of a part of it as gate_proj of gate_up_proj."""
    if isinstance(wanted, str):
        return wanted.lower() == ALL_LINEAR
    words = set(stacked.split("_"))
    return any(stacked == name or set(name.split("_")) < words for name in (w.split(".")[-1] for w in wanted))


def nothing_found(config: LoraConfig, candidates: dict[str, nn.Module]) -> str:
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
            ("modules_to_save", config.modules_to_save),
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
    if not candidates:
        return f"{told}: the model has no modules inside; put a single layer into one first, e.g. nn.Sequential(layer)"
    return f"{told}; want one of: {', '.join(closest) or 'none, this model has no layer that can be adapted'}"


def _ranges(numbers: list[int]) -> str:
    """Return rising numbers as text, runs shortened: "0 to 31"."""
    if numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 1:
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))
