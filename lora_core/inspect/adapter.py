"""What an adapter's folder says: its configuration, its pairs A and B, and whether the two agree."""

import math
import re
import warnings
from typing import Any

import torch
from torch import Tensor

from lora_core.adapt.configuration import config_from_peft, differences, unknown_fields
from lora_core.adapt.files import CONFIG, embedded_config
from lora_core.adapt.finite import is_finite
from lora_core.adapt.keys import PREFIX, canonical, other_tool
from lora_core.adapt.names import matches
from lora_core.errors import LoraCoreError
from lora_core.inspect.files import Tensors
from lora_core.inspect.report import Pair, Report
from lora_core.methods.lora import LoraConfig

HALF = re.compile(r"\.(lora_[AB]\.weight|lora_embedding_[AB])$")
SWAPPED = str.maketrans("AB", "BA")

SHOWN_SETTINGS = ("r", "lora_alpha", "lora_dropout", "target_modules", "bias", "modules_to_save", "init_lora_weights")


def describe_adapter(report: Report, written: dict[str, Any] | None, tensors: Tensors) -> set[str]:
    """Add to report what the configuration and the pairs say; return the names of the tensors accounted for.

    Args:
        report: changed in place.
        written: adapter_config.json, if there is one.
        tensors: the adapter's.
    """
    embedded = embedded_config(tensors.metadata)
    values = written if written is not None else embedded
    _compare(report, written, embedded)
    config = _configuration(report, values)
    names = _short_names(report, tensors)
    report.settings = _settings(values, config, list(names))
    used: set[str] = set()
    for name in sorted(names):
        half = HALF.search(name)
        if not half or "A" not in half.group():
            continue
        other = str(_partner(name))
        if other not in names:
            report.problems.append(f"{name} has no {other} beside it: the file is not whole")
            continue
        used |= {names[name], names[other]}
        module = name[: half.start()].removeprefix(PREFIX)
        a, b = tensors.read(names[name]), tensors.read(names[other])
        pair = _pair(report, module, a, b, config)
        if pair is not None:
            report.pairs.append(pair)
    orphans = [n for short, n in names.items() if "lora_B" in short and n not in used]
    report.problems += [f"{n} has no A beside it: the file is not whole" for n in orphans if n.endswith("weight")]
    _judge(report, values, config, list(names))
    return used


def _short_names(report: Report, tensors: Tensors) -> dict[str, str]:
    """Return the file's names by what loading takes them for; two different tensors of one name are a problem."""
    every = set(tensors.names())
    # a pair as PEFT writes it, whatever the modules around it are called
    found = {n: n for n in every if _partner(n) in every}
    for name in sorted(every - found.keys()):
        short = str(canonical(name) or name)
        other = found.setdefault(short, name)
        if other != name and not _are_equal(tensors.read(other), tensors.read(name)):
            report.problems.append(f"{other} and {name} are two different tensors of one name: want one adapter a file")
    return found


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Say whether two tensors hold the same values, in any dtypes that can be computed with."""
    try:
        return one.shape == other.shape and torch.equal(one.double(), other.double())
    except NotImplementedError:
        return False


def _partner(name: str) -> str | None:
    """Return the name of the B that belongs to an A, of the A that belongs to a B, or None of anything else."""
    half = HALF.search(name)
    return name[: half.start()] + half.group().translate(SWAPPED) if half else None


def update_norm(lora_a: Tensor, lora_b: Tensor) -> float:
    """Return the Frobenius norm of B A as sqrt(trace((B^T B) (A A^T))), without forming B A unless that is smaller.

    Args:
        lora_a: shape [R, ...].
        lora_b: shape [N, R, ...].
    """
    a, b = lora_a.double().flatten(1), lora_b.double().flatten(1)
    if len(b) * a.shape[1] < len(a) ** 2:
        return float((b @ a).norm())
    squared = float(((b.T @ b) * (a @ a.T)).sum())
    # rounding may leave a tiny negative number where the product is zero
    return math.sqrt(max(squared, 0.0)) if not math.isnan(squared) else math.nan


def _pair(report: Report, module: str, a: Tensor, b: Tensor, config: LoraConfig | None) -> Pair | None:
    if not _belong_together(a, b):
        report.problems.append(
            f"{module}: A is {list(a.shape)} and B {list(b.shape)}; want [R, K] and [N, R], or of a convolution "
            "[R, C, k...] and [N, R / groups, 1...]: the file is damaged, save it again"
        )
        return None
    rank = int(a.shape[0])
    scaling = config.scaling_of(module) if config is not None else None
    if config is not None and config.rank_of(module) != rank:
        report.problems.append(f"{module}: the configuration says rank {config.rank_of(module)}, A has {rank} rows")
    if not (a.is_floating_point() and b.is_floating_point()):
        report.problems.append(f"{module}: A is {_dtype(a)} and B {_dtype(b)}; want floating numbers: save it again")
        return None
    dtype = _dtype(a)
    try:
        # not every operation knows every 8-bit dtype; float64 holds all their values
        a, b = a.double(), b.double()
    except NotImplementedError:
        report.problems.append(
            f"{module}: A is {dtype} and B {_dtype(b)}, which cannot be computed with: save it again"
        )
        return None
    finite = is_finite(a) and is_finite(b)
    if not finite:
        report.problems.append(f"{module}: A or B holds NaN or infinity; train again with a smaller learning rate")
    # a grouped convolution's B has R / groups columns: its product is not one matrix
    norm = update_norm(a, b) if b.shape[1] == rank else math.nan
    return Pair(
        module=module,
        rank=rank,
        scaling=scaling,
        shape_a=tuple(a.shape),
        shape_b=tuple(b.shape),
        dtype=dtype,
        update_norm=norm * abs(scaling) if scaling is not None else norm,
        untrained=finite and (not bool(a.any()) or not bool(b.any())),
    )


def _belong_together(a: Tensor, b: Tensor) -> bool:
    """Say whether these are A and B of one layer, by their shapes alone.

    Beyond two dimensions they are a convolution's: B has kernels of one element, and R / groups columns.
    """
    if a.dim() != b.dim() or a.dim() < 2:
        return False
    rank, columns = a.shape[0], b.shape[1]
    if not rank or not columns or rank % columns or any(side != 1 for side in b.shape[2:]):
        return False
    groups = rank // columns
    return groups == 1 or (a.dim() > 2 and a.shape[1] % groups == 0 and b.shape[0] % groups == 0)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _compare(report: Report, written: dict[str, Any] | None, embedded: dict[str, Any] | None) -> None:
    if written is None and embedded is None:
        report.problems.append(f"there is no {CONFIG} and no copy of it in the weights: alpha and targets are unknown")
    elif written is None:
        report.notes.append(f"there is no {CONFIG}; this is the copy inside the weights")
    elif embedded is not None:
        for name, (a, b) in differences(written, embedded).items():
            report.problems.append(
                f"{CONFIG} and the weights' metadata differ in {name}: {a!r} and {b!r}; they are not of one generation"
            )


def _configuration(report: Report, values: dict[str, Any] | None) -> LoraConfig | None:
    if values is None:
        return None
    try:
        with warnings.catch_warnings():
            # unknown fields are listed below
            warnings.simplefilter("ignore")
            config = config_from_peft(values)
    except LoraCoreError as error:
        report.problems.append(f"cannot be loaded here: {error}")
        return None
    targets = values.get("target_modules")
    whole_modules_alone = targets in (None, []) and config.modules_to_save
    if not whole_modules_alone and not (isinstance(targets, (str, list)) and targets):
        report.problems.append(f"target_modules is {targets!r}; want a list of names, or one string")
    return config


def _settings(values: dict[str, Any] | None, config: LoraConfig | None, names: list[str]) -> dict[str, Any]:
    values = values or {}
    kind = _kind(values)
    method = {"LORA": "LoRA"}.get(kind, kind)
    if kind == "LORA" and values.get("use_rslora"):
        method = "rsLoRA"
    if any(n.endswith("lora_magnitude_vector") for n in names):
        method = "DoRA"
    found: dict[str, Any] = {"method": method}
    found.update({name: values[name] for name in SHOWN_SETTINGS if values.get(name) not in (None, [], {})})
    if config is not None:
        found["scaling"] = config.scaling_of("")
    for name in ("rank_pattern", "alpha_pattern", "base_model_name_or_path", "peft_version"):
        if values.get(name):
            found[name] = values[name]
    return found


def _kind(values: dict[str, Any] | None) -> str:
    return str((values or {}).get("peft_type", "LORA")).upper()


def _judge(report: Report, values: dict[str, Any] | None, config: LoraConfig | None, names: list[str]) -> None:
    """Add what only the whole shows."""
    # another method's fields are its own
    unknown = unknown_fields(values or {}) if _kind(values) == "LORA" else {}
    for name, near in unknown.items():
        hint = f"; did you mean {near}?" if near else ""
        report.notes.append(f"{CONFIG} has a field that is not known here: {name} = {(values or {})[name]!r}{hint}")
    untrained = [p.module for p in report.pairs if p.untrained]
    if report.pairs and len(untrained) == len(report.pairs):
        report.problems.append("adapter never trained: every B A is zero, so the base model's output does not change")
    elif untrained:
        report.notes.append(f"never trained, B A is zero: {', '.join(untrained)}")
    targets = config.target_modules if config is not None else None
    if targets is not None and not isinstance(targets, str):
        idle = [t for t in targets if not any(matches(p.module, [t]) for p in report.pairs)]
        foreign = other_tool(names)
        if foreign:
            report.problems.append(foreign)
        elif not report.pairs and not report.problems:
            report.problems.append(f"there is no pair {PREFIX}<module>.lora_A.weight and lora_B for target_modules")
        elif idle:
            report.notes.append(f"target_modules without a tensor in the file: {', '.join(idle)}")
