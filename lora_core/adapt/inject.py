"""add_adapter: put low-rank adapters into a model, in place."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

from lora_core.adapt.checkpointing import let_gradients_in
from lora_core.adapt.fast_path import settle_fast_paths
from lora_core.adapt.kinds import adapted_kind
from lora_core.adapt.modules_to_save import find_saved, with_task_heads
from lora_core.adapt.switch import set_adapter
from lora_core.adapt.target import find_targets
from lora_core.adapt.unsupported import refuse_peft, refuse_unshaped
from lora_core.adapt.walk import (
    Ties,
    adapter_names,
    layers_of,
    parts,
    places,
    plain_name,
    refuse_wrapped,
    replace,
    require_editable,
    unwrapped,
)
from lora_core.adapt.warn import warn
from lora_core.adapt.withdraw import withdraw
from lora_core.errors import AdapterError, ConfigError, NonFiniteError
from lora_core.layers.adapter import Adapter, AdapterLayer
from lora_core.layers.nf4_linear import LoraNF4Linear
from lora_core.layers.trainable_copy import Copied, TrainableCopy
from lora_core.methods.lora import LoraConfig
from lora_core.methods.start import initialise, starts_from_weight, take_start


def add_adapter(
    model: nn.Module,
    config: LoraConfig,
    adapter_name: str = "default",
    *,
    autocast_adapter_dtype: bool = True,
) -> nn.Module:
    """Replace the targeted layers by adapted ones that share their weights, and freeze all but the new adapter.

    At the start the model computes what it did before, but for init_lora_weights=False, and for "pissa" and "olora",
    which take s B A out of W: up to rounding to its dtype, and up to quantising a 4-bit weight anew. The new adapter is
    the active one.

    Args:
        model: any module; changed in place.
        config: what to adapt and how. A task_type of a classifier has its head trained whole too, as in PEFT.
        adapter_name: a name without dots, new to this model.
        autocast_adapter_dtype: keep A and B in float32 over a half-precision base, as PEFT does.
    Returns:
        model.
    Raises:
        TargetNotFoundError: if no module matches.
        ConfigError: if a matching module cannot be adapted or trained whole, any has parameters without a shape yet,
            or "pissa" or "olora" would change a tied weight.
        DtypeError: if a matching weight is of a dtype that cannot be adapted.
        NonFiniteError: if "pissa" or "olora" is to start from a weight that holds NaN or infinity.
        AdapterError: if the name is taken, an adapter is merged, adapters are disabled for a while, PEFT has put
            adapters into the model, another adapter trains biases too, or processes are synchronised already (DDP,
            FSDP).
    Source: Hu et al. 2021.
    """
    inner = unwrapped(model)
    refuse_wrapped(model, f"add adapter {adapter_name!r}")
    if not isinstance(config, LoraConfig):
        kind = f"{type(config).__module__}.{type(config).__qualname__}"
        raise ConfigError(
            f"add_adapter: config is a {kind}; want a lora_core.LoraConfig, which has the same field names as PEFT's"
        )
    config = with_task_heads(inner, config)
    with injected(
        inner,
        config,
        adapter_name,
        initialise_pairs=True,
        trainable=True,
        autocast_adapter_dtype=autocast_adapter_dtype,
    ):
        set_adapter(inner, adapter_name)
    return model


@contextlib.contextmanager
def injected(
    model: nn.Module,
    config: LoraConfig,
    adapter_name: str,
    *,
    initialise_pairs: bool,
    trainable: bool,
    autocast_adapter_dtype: bool,
) -> Iterator[None]:
    """Create an adapter's matrices everywhere; what is done inside fills or activates them.

    A failure, here or there, leaves the model as it was.
    """
    _check_name(model, adapter_name)
    require_editable(model, f"add adapter {adapter_name!r}")
    refuse_peft(model, f"add adapter {adapter_name!r}")
    refuse_unshaped(model, f"add adapter {adapter_name!r}")
    # it is saved with the adapter, and its lists and patterns are the caller's, who may go on to change them
    config = copy.deepcopy(config)
    _refuse_second_biases(model, config)
    targets = find_targets(model, config) if config.target_modules or not config.modules_to_save else []
    saved = find_saved(model, config)
    if starts_from_weight(config.init_lora_weights):
        _refuse_tied_starts(model, targets)
    where = places(model)
    try:
        for name in targets:
            layer = _adapted(model, name, where)
            adapter = Adapter(
                rank=config.rank_of(plain_name(name)),
                scaling=config.scaling_of(plain_name(name)),
                dropout=config.lora_dropout,
                config=config,
                trainable=trainable,
            )
            layer.add(adapter_name, adapter, None if autocast_adapter_dtype else layer.weight.dtype)
            if initialise_pairs:
                _initialise(layer, adapter_name, config, name)
        for name in saved:
            _copying(model, name, where).add(adapter_name, Copied(config, trainable))
        if initialise_pairs and starts_from_weight(config.init_lora_weights):
            take_starts(model, adapter_name)
        settle_fast_paths(model)
        if trainable:
            let_gradients_in(model)
        yield
    # an interrupt, too
    except BaseException:
        withdraw(model, adapter_name)
        raise


def _initialise(layer: AdapterLayer, adapter_name: str, config: LoraConfig, name: str) -> None:
    try:
        initialise(layer, adapter_name, config.init_lora_weights)
    except NonFiniteError as error:
        raise NonFiniteError(f"{name}: {error}; the model is unchanged") from None


def take_starts(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter's start out of the weights it starts from."""
    layers = layers_of(model, adapter_name).values()
    # before anything is changed: where warnings are errors, the model stays as it was
    if any(isinstance(layer, LoraNF4Linear) for layer in layers):
        warn(
            f"adapter {adapter_name!r} starts from 4-bit weights: what is left of them was quantised anew, so the "
            "model starts off by that rounding; init_lora_weights=True starts exactly"
        )
    for layer in layers:
        take_start(layer, adapter_name)


def _refuse_second_biases(model: nn.Module, config: LoraConfig) -> None:
    """Raise AdapterError if another adapter trains the model's biases already: there is but one of each."""
    if config.bias == "none":
        return
    for part in parts(model).values():
        other = next((name for name, adapter in part.adapters.items() if adapter.config.bias != "none"), None)
        if other is not None:
            raise AdapterError(
                f"adapter {other!r} trains the model's biases already, which are not kept for each adapter: add this "
                "one with bias='none', or take that one out with delete_adapter or merge_and_unload first"
            )


def _refuse_tied_starts(model: nn.Module, targets: list[str]) -> None:
    """Raise ConfigError where a start would take a part out of a weight that another module uses too."""
    ties = Ties(model)
    for name in targets:
        layer = model.get_submodule(name)
        base = layer.base_layer if isinstance(layer, AdapterLayer) else layer
        own = f"{name}.base_layer.weight" if isinstance(layer, AdapterLayer) else f"{name}.weight"
        others = [o for o in ties.of(base.weight) if o != own]
        if others:
            raise ConfigError(
                f"init_lora_weights 'pissa' and 'olora' take a part out of the weight, and that of {name} is tied to "
                f"{', '.join(others)}, which would change too: leave {name} out with exclude_modules, untie the "
                "weights, or use init_lora_weights=True"
            )


def _adapted(model: nn.Module, name: str, where: dict[nn.Module, list[str]]) -> AdapterLayer:
    """Return the adapted layer at this name, made now if it is not there yet."""
    module = model.get_submodule(name)
    if isinstance(module, AdapterLayer):
        return module
    kind: Any = adapted_kind(module)
    layer: AdapterLayer = kind(module)
    replace(model, where[module], layer)
    return layer


def _copying(model: nn.Module, name: str, where: dict[nn.Module, list[str]]) -> TrainableCopy:
    module = model.get_submodule(name)
    if isinstance(module, TrainableCopy):
        return module
    copies = TrainableCopy(module)
    replace(model, where[module], copies)
    return copies


def _check_name(model: nn.Module, name: str) -> None:
    if not isinstance(name, str) or not name or "." in name:
        raise AdapterError(f"adapter name {name!r}: want a non-empty string without dots")
    if any(hasattr(container, name) for container in (nn.ParameterDict(), nn.ModuleDict())):
        raise AdapterError(f"adapter name {name!r} is an attribute of PyTorch's own containers: choose another name")
    if name in adapter_names(model):
        raise AdapterError(f"the model has an adapter {name!r} already: choose another name, or delete it first")
