"""LoraConfig to and from PEFT's adapter_config.json.

Source: PEFT 0.21.2, LoraConfig.
"""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from typing import Any

from lora_core.adapt.warn import warn
from lora_core.errors import ConfigError
from lora_core.methods.lora import LoraConfig
from lora_core.methods.peft_fields import REFUSED, is_harmless

PEFT_TYPE = "LORA"

# Starts that change the base weight in ways that only PEFT can repeat.
REFUSED_STARTS = ("loftq", "corda", "lora_ga")

# Starts that leave the base weight alone: once trained, an adapter is the same whatever it started from.
FORGOTTEN_STARTS = ("eva", "orthogonal", "mica")

# Fields that change nothing in the forward: kept and written back without a word.
KEPT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "loftq_config",
        "lora_ga_config",
        "megatron_core",
        "merge_weights",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
    }
)

# Fields that are not LoraConfig's and are always there.
ALWAYS = ("peft_type", "inference_mode")

# What is computed depends on these; two configurations that differ here cannot share one set of weights.
ESSENTIAL = (
    "peft_type",
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "bias",
    "use_rslora",
    "init_lora_weights",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    *REFUSED,
)

# Fields whose null means their default.
NULLABLE = ("rank_pattern", "alpha_pattern", "init_lora_weights", "fan_in_fan_out", "use_rslora", "use_dora")

# fields of which one entry may stand for a list of it
LISTED = ("layers_to_transform", "layers_pattern")

# what a field is that a file leaves out
DEFAULTS = {f.name: f.default for f in dataclasses.fields(LoraConfig) if f.default is not dataclasses.MISSING}


def config_from_peft(values: Mapping[str, Any]) -> LoraConfig:
    """Return the LoraConfig that the values of an adapter_config.json describe.

    Fields unknown here go to LoraConfig.extra; those unknown to PEFT as well are reported in a warning.

    Raises:
        ConfigError: if it is not a LoRA adapter, or sets a field that changes the forward and is not implemented.
    """
    given = dict(values)
    _require_lora(given.pop("peft_type", None))
    given.pop("inference_mode", None)
    refuse_unimplemented(given)
    fields = {name: given.pop(name) for name in LoraConfig.field_names() if name in given}
    fields = {name: value for name, value in fields.items() if value is not None or name not in NULLABLE}
    start = fields.get("init_lora_weights")
    if isinstance(start, str):
        _refuse_start(start)
        fields["init_lora_weights"] = _start(start)
    _report_unknown(given)
    return LoraConfig(**fields, extra=given)


def refuse_unimplemented(values: Mapping[str, Any]) -> None:
    """Raise ConfigError if an adapter_config.json asks for another forward than is implemented."""
    for name, value in values.items():
        if not is_harmless(name, value):
            raise ConfigError(
                f"adapter_config.json sets {name} to {value!r}, which changes what the model computes and is not "
                f"implemented: want {REFUSED[name][0]!r}; load this adapter with PEFT, or train one without {name}"
            )


def config_to_peft(config: LoraConfig) -> dict[str, Any]:
    """Return the values of the adapter_config.json for this configuration.

    Raises:
        ConfigError: if LoraConfig.extra holds something that JSON cannot.
    """
    known = {name: _plain(getattr(config, name)) for name in LoraConfig.field_names()}
    values = {**config.extra, **known, "peft_type": PEFT_TYPE, "inference_mode": True}
    try:
        # what is written is what is compared later: tuples become lists here, not only in the file
        plain: dict[str, Any] = json.loads(json.dumps(values))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"LoraConfig cannot be written as JSON: {error}; keep only strings, numbers, lists and dicts in extra"
        ) from None
    return plain


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the fields that change what is computed and differ between two adapter_config.json."""
    pairs = {name: (one.get(name), other.get(name)) for name in ESSENTIAL}
    return {name: (a, b) for name, (a, b) in pairs.items() if _meaning(name, a) != _meaning(name, b)}


def _require_lora(peft_type: Any) -> None:
    if peft_type is None:
        raise ConfigError(
            f'adapter_config.json has no peft_type: want "peft_type": "{PEFT_TYPE}", the kind of adapter supported here'
        )
    if str(peft_type).upper() != PEFT_TYPE:
        raise ConfigError(
            f"adapter_config.json holds an adapter of peft_type {peft_type!r}; want {PEFT_TYPE!r} (LoRA and rsLoRA), "
            "the one supported here: load others with PEFT"
        )


def _start(name: str) -> bool | str:
    """Return the start that a name means; PEFT takes "OLoRA" and "Gaussian" too."""
    return True if name.lower() in FORGOTTEN_STARTS else name.lower()


def _refuse_start(start: str) -> None:
    if start.lower().startswith(REFUSED_STARTS):
        raise ConfigError(
            f"adapter_config.json has init_lora_weights {start!r}, which changed the base weight in a way that cannot "
            "be repeated here: save it in PEFT with path_initial_model_for_weight_conversion, which makes it a plain "
            "LoRA adapter, and load that"
        )


def unknown_fields(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the fields that are known neither here nor to PEFT, each with the nearest that is, or ""."""
    known = [*LoraConfig.field_names(), *REFUSED, *KEPT, *ALWAYS]
    near = {name: difflib.get_close_matches(name, known, n=1, cutoff=0.8) for name in sorted(set(values) - set(known))}
    return {name: "".join(found) for name, found in near.items()}


def _report_unknown(values: Mapping[str, Any]) -> None:
    unknown = unknown_fields(values)
    if unknown:
        told = ", ".join(f"{name} (did you mean {near}?)" if near else name for name, near in unknown.items())
        warn(
            f"adapter_config.json has fields that are not known here: {told}; they are kept and written back, and "
            "otherwise ignored"
        )


def _plain(value: Any) -> Any:
    """Return value as JSON knows it; a set in a fixed order."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value


def _meaning(name: str, value: Any) -> Any:
    """Return a field, None where it is left out, so that two ways of writing the same thing are equal."""
    if name in REFUSED and is_harmless(name, value):
        return REFUSED[name][0]
    if name == "peft_type":
        return str(value).upper()
    value = DEFAULTS.get(name) if value is None else value
    if name == "init_lora_weights" and isinstance(value, str):
        value = _start(value)
    if name in LISTED and isinstance(value, (int, str)):
        value = [value]
    if isinstance(value, list) and len(set(map(type, value))) == 1 and type(value[0]) in (int, str):
        value = sorted(value)
    # an empty list, an empty dict and false all mean what leaving the field out means
    return value if value or name in ("r", "lora_alpha") else None
