"""Whether adapters can be merged into the weights they are for: asked of all layers before one is changed."""

import math

import torch
from torch import Tensor, nn

from lora_core.adapt.walk import Ties, layers_of
from lora_core.errors import AdapterError, NonFiniteError
from lora_core.layers.adapter import AdapterLayer
from lora_core.layers.as_written import is_sharded

# roundings of an output's size between two outputs, each a sum of many products; generous, as a tenth is looked for
OUTPUT_ROUNDINGS = 8


def mergeable_layers(model: nn.Module, names: tuple[str, ...]) -> dict[str, AdapterLayer]:
    """Return the layers to merge into; all are checked before one is changed: a refusal leaves the model as it was."""
    _refuse_tied(model, names)
    layers = layers_of(model, *names)
    for name, layer in layers.items():
        reason = layer.why_unmergeable()
        if reason:
            raise AdapterError(f"cannot merge into {name}: {reason}; keep the adapter unmerged")
        _refuse_non_finite(name, layer, names)
        if layer.is_altered():
            _refuse_other_use(name, layer, names)
    return layers


def update_of(layer: AdapterLayer, names: tuple[str, ...]) -> Tensor:
    """Return sum s B A of those of these adapters that a layer has: of one in float32 or wider, of more in float64."""
    device = layer.weight.device
    first, *others = (name for name in names if name in layer.adapters)
    total = layer.delta(first).to(device)
    for name in others:
        total = total.double().add_(layer.delta(name).to(device))
    return total


def merged_weight(layer: AdapterLayer, names: tuple[str, ...]) -> Tensor:
    """Return W + sum s B A in float32 or wider."""
    return layer.read_weight() + update_of(layer, names)


def _refuse_non_finite(name: str, layer: AdapterLayer, names: tuple[str, ...]) -> None:
    # most are so far from overflowing that neither has to be looked through
    if _bound(layer, names) < torch.finfo(layer.weight.dtype).max / 2:
        return
    if not layer.read_weight().isfinite().all():
        raise NonFiniteError(
            f"the base weight of {name} holds NaN or infinity already, whatever is merged into it: repair it, or load "
            "the base again; nothing was changed"
        )
    if not torch.isfinite(merged_weight(layer, names).to(layer.weight.dtype)).all():
        raise NonFiniteError(
            f"merging {', '.join(names)} into {name} gives NaN or infinity in {layer.weight.dtype}: the adapter is "
            "broken, or its update too large for the dtype; nothing was changed"
        )


def _bound(layer: AdapterLayer, names: tuple[str, ...]) -> float:
    """Return what no element of W, nor of its sum with these adapters, exceeds; NaN or infinity if that is unknown."""
    weight = layer.read_weight()
    if is_sharded(weight):
        # a process's share may be empty, and all have to answer alike
        return math.inf
    largest = float(weight.abs().amax()) if weight.numel() else 0.0
    return largest + sum(layer.delta_bound(n) for n in names if n in layer.adapters)


@torch.no_grad()
def _refuse_other_use(name: str, layer: AdapterLayer, names: tuple[str, ...]) -> None:
    """Raise AdapterError if the base layer's output does not follow its weight as a plain one's does: try it."""
    backup, before = layer.backup_weight(), layer.read_weight().clone()
    with torch.random.fork_rng(devices=[layer.weight.device] if layer.weight.device.type == "cuda" else []):
        x = layer.sample_input()
    try:
        plain = layer.base_layer(x)
        layer.write_weight(merged_weight(layer, names))
        changed = (layer.base_layer(x) - plain).double()
        wide = x.double() if x.is_floating_point() else x
        wanted = layer.response(wide, layer.read_weight().double() - before.double())
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise AdapterError(
            f"cannot merge into {name}: whether its forward, which is its own, follows its weight could not be tried "
            f"({type(error).__name__}: {error}); keep the adapter unmerged"
        ) from error
    finally:
        layer.restore_weight(backup)
    # both outputs are rounded; a tenth of the update is far above that, and far below what a wrong use makes of it
    noise = OUTPUT_ROUNDINGS * torch.finfo(plain.dtype).eps * plain.double().norm()
    if (changed - wanted).norm() > wanted.norm() / 10 + noise:
        raise AdapterError(
            f"cannot merge into {name}: a forward or hook of its own uses the weight in another way than its class "
            "does, and the update with it; keep the adapter unmerged"
        )


def _refuse_tied(model: nn.Module, names: tuple[str, ...]) -> None:
    """Raise AdapterError if a weight to be changed is used by another module too, which would change with it."""
    ties = Ties(model)
    for name, layer in layers_of(model, *names).items():
        others = [o for o in ties.of(layer.weight) if o != f"{name}.base_layer.weight"]
        if others:
            raise AdapterError(
                f"cannot merge into {name}: its weight is tied to {', '.join(others)}, which would change too; untie "
                "them (give one a clone of the weight), or keep the adapter unmerged"
            )
