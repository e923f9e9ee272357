"""quantize_model: hold a model's linear layers in frozen NF4."""

from collections.abc import Sequence

from torch import Tensor, nn

from lora_core.adapt.bypassed import bypassed, works_on
from lora_core.adapt.fast_path import settle_fast_paths
from lora_core.adapt.kinds import is_held_by_others, is_transposed_linear
from lora_core.adapt.names import first_few, inside_any, matches
from lora_core.adapt.target import output_head
from lora_core.adapt.unsupported import refuse_peft, refuse_unshaped
from lora_core.adapt.untargeted import stacked_weights
from lora_core.adapt.walk import Ties, adapter_names, original_modules, places, plain_name, replace, unwrapped
from lora_core.adapt.warn import warn
from lora_core.errors import AdapterError, ConfigError, DtypeError, NonFiniteError, TargetNotFoundError
from lora_core.layers.as_written import stands_for_others
from lora_core.layers.linear import LoraLinear, LoraTransposedLinear
from lora_core.layers.nf4_linear import NF4Linear
from lora_core.methods.fields import is_names
from lora_core.methods.nf4 import NF4Config
from lora_core.quant.blockwise import check_input

# names in a warning
SHOWN = 3


def quantize_model(
    model: nn.Module, config: NF4Config | None = None, skip_modules: Sequence[str] | None = None
) -> nn.Module:
    """Replace linear layers by frozen NF4 ones, in place.

    Left alone: the output head (unless skip_modules says otherwise), layers whose weight is tied to another module,
    layers that are never called, as that of nn.MultiheadAttention, what is quantised already, and, with a warning,
    layers with a forward, hooks or a parametrisation of their own, and experts' weights that are stacked in one tensor.
    Each dense weight is let go before the next is quantised, unless somebody else holds it.

    Args:
        model: any module without adapters; its linear layers (nn.Linear, transformers' Conv1D) are replaced.
        config: the format; NF4Config() by default.
        skip_modules: name suffixes of what to leave in full precision, with all inside; by default the output head.
    Returns:
        model.
    Raises:
        NonFiniteError: if a weight holds NaN or infinity, naming it; the model is unchanged.
        DtypeError: if a weight is of a dtype that cannot be quantised; the model is unchanged.
        TargetNotFoundError: if there is no layer to quantise.
        AdapterError: if the model has adapters, PEFT's too: quantise first, then add them.
        ConfigError: if the model is a single layer or has parameters without a shape yet, or an argument is of another
            kind.
    Source: Dettmers et al. 2023, section 3.
    """
    config = config or NF4Config()
    if not isinstance(config, NF4Config):
        raise ConfigError(f"quantize_model: config is a {type(config).__name__}; want an NF4Config")
    if adapter_names(model):
        raise AdapterError(
            f"quantize_model: the model has adapters {adapter_names(model)}; quantise it before adding any"
        )
    refuse_peft(model, "quantise the model")
    refuse_unshaped(model, "quantise the model")
    if not model._modules:
        raise ConfigError(
            f"quantize_model: the model is a single {type(model).__name__}, which cannot be replaced inside itself: "
            "put it into a module first, e.g. nn.Sequential(layer)"
        )
    if not (skip_modules is None or is_names(skip_modules)):
        raise ConfigError(f"quantize_model: skip_modules is {skip_modules!r}; want a list of names, or None")
    # by name: held here, a dense layer would stay until the last is quantised
    chosen = _choose(model, config, skip_modules)
    for names in chosen:
        _check(model.get_parameter(f"{names[0]}.weight"), names[0])
    _warn_of_unmatched(model, skip_modules)
    for names in chosen:
        replace(model, names, _quantised(model.get_submodule(names[0]), config))
    settle_fast_paths(model)
    return model


def _choose(model: nn.Module, config: NF4Config, skip: Sequence[str] | None) -> list[list[str]]:
    """Return the names of every layer to quantise, and warn of what is left.

    Raises:
        TargetNotFoundError: if there is none.
    """
    where = places(model)
    head = output_head(unwrapped(model)) if skip is None else None
    chosen = {m: names for m, names in where.items() if m is not head and _is_wanted(model, m, names, skip or ())}
    ties = Ties(model)
    own = {m: names for m, names in chosen.items() if _is_used_otherwise(model, m, names)}
    chosen = {m: names for m, names in chosen.items() if m not in own and not ties.of(m.weight)}
    why = _why_left(own)
    if not chosen and not any(isinstance(m, NF4Linear) for m in where):
        raise TargetNotFoundError(
            f"quantize_model: no linear layer to quantise outside skip_modules={skip!r}; want nn.Linear or "
            "transformers' Conv1D in floating point, which no other library has quantised"
            + (f"; it has to leave {why}" if own else "")
        )
    if own:
        warn(f"quantize_model leaves {why}")
    other = [names[0] for m, names in where.items() if isinstance(m, NF4Linear) and not _is_in(m, config)]
    if other:
        warn(
            f"quantize_model leaves {first_few(other, SHOWN)} in the 4-bit format they are in: quantise the model in "
            "full precision to change it"
        )
    _warn_of_stacked(model, skip or ())
    return list(chosen.values())


def _why_left(own: dict[nn.Module, list[str]]) -> str:
    """Return which layers stay in full precision, and why."""
    told = first_few([names[0] for names in own.values()], SHOWN)
    hooked = any(hasattr(module, "_hf_hook") for module in own)
    way = "; accelerate's hooks are on them: quantise the model before it is dispatched or offloaded" if hooked else ""
    return (
        f"{told} in full precision: a forward, hooks, a parametrisation, modules inside or another use of the weight "
        f"would be lost{way}"
    )


def _warn_of_stacked(model: nn.Module, skip: Sequence[str]) -> None:
    found = stacked_weights({"": model, **dict(original_modules(model))})
    stacked = {name: p.numel() for name, p in found if not inside_any(plain_name(name), skip)}
    if stacked:
        total = sum(p.numel() for p in model.parameters())
        warn(
            f"quantize_model leaves stacked weights in full precision, which are in no linear layer: "
            f"{first_few(list(stacked), SHOWN)}: {sum(stacked.values()):,} of {total:,} parameters"
        )


def _quantised(layer: nn.Module, config: NF4Config) -> NF4Linear:
    return NF4Linear.from_dense(
        layer,
        block_size=config.block_size,
        double_quant=config.double_quant,
        compute_dtype=config.compute_dtype,
        transposed=is_transposed_linear(layer),
    )


def _is_wanted(model: nn.Module, module: nn.Module, names: list[str], skip: Sequence[str]) -> bool:
    if not isinstance(module, nn.Linear) and not is_transposed_linear(module):
        return False
    if is_held_by_others(module) or stands_for_others(module._parameters.get("weight")):
        return False
    if any(bypassed(model, name) for name in names):
        return False
    return not any(inside_any(plain_name(name), skip) for name in names)


def _is_used_otherwise(model: nn.Module, module: nn.Module, names: list[str]) -> bool:
    """Say whether a layer does or holds more than x W^T + b, or its module more than calls it: as NF4 it could not."""
    plain = LoraTransposedLinear if is_transposed_linear(module) else LoraLinear
    if module._modules or any(works_on(model, name) for name in names):
        return True
    return not plain(module).is_as_written() or not isinstance(module._parameters.get("weight"), nn.Parameter)


def _is_in(layer: NF4Linear, config: NF4Config) -> bool:
    """Say whether a layer is in the format that a configuration asks for."""
    q = layer.weight
    return (q.block_size, q.double_quant) == (config.block_size, config.double_quant)


def _check(weight: Tensor, name: str) -> None:
    try:
        check_input(weight)
    except (DtypeError, NonFiniteError) as error:
        raise type(error)(f"quantize_model: {name}.weight: {error}; the model is unchanged") from error


def _warn_of_unmatched(model: nn.Module, skip: Sequence[str] | None) -> None:
    names = [plain_name(name) for name, _ in model.named_modules()]
    idle = [word for word in skip or () if not any(matches(name, [word]) for name in names)]
    if idle:
        warn(f"skip_modules: no module is called {', '.join(map(repr, idle))}")
