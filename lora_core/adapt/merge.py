"""merge_adapter, unmerge_adapter, merge_and_unload: adapters inside the weights, and out again.

    W' = W + sum s B A, computed in float32 or wider and rounded once to the dtype (or the 4-bit format) of W

Rounding makes W' differ from W + s B A: the report says by how much. Subtracting s B A again would not give W back, so
unmerging restores a copy that is kept in CPU memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_core.adapt.mergeable import mergeable_layers, merged_weight, update_of
from lora_core.adapt.switch import activate, active_names, chosen_names, refuse_rivals
from lora_core.adapt.walk import (
    merged_names,
    parts,
    places,
    replace,
    require_adapters,
    require_editable,
    shared_out,
)
from lora_core.adapt.withdraw import tidy
from lora_core.errors import AdapterError
from lora_core.layers.adapter import AdapterLayer
from lora_core.layers.as_written import is_sharded
from lora_core.layers.merged import Merged
from lora_core.layers.nf4_linear import LoraNF4Linear
from lora_core.layers.trainable_copy import TrainableCopy

# elements of a weight that are compared together
COMPARED = 2**20


@dataclass(frozen=True)
class LayerMerge:
    """How exact one layer's merge is.

    Args:
        relative_error: ||W' - (W + s B A)|| / ||W + s B A||, Frobenius norms, in float64.
        largest_error: the largest |W' - (W + s B A)| of an element.
        requantized: the weight was quantised anew, which is most of the error.
    """

    relative_error: float
    largest_error: float
    requantized: bool


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Args:
        names: the adapters merged.
        layers: the error of each layer, by module name.
        backup_bytes: CPU memory held to restore the weights; 0 once unloaded.
    """

    names: tuple[str, ...]
    layers: dict[str, LayerMerge]
    backup_bytes: int

    @property
    def worst(self) -> float:
        """Return the largest relative error of a layer."""
        return max((layer.relative_error for layer in self.layers.values()), default=0.0)

    def __str__(self) -> str:
        requantized = sum(layer.requantized for layer in self.layers.values())
        cost = f", {requantized} of them requantised" if requantized else ""
        return (
            f"merged {', '.join(self.names)} into {len(self.layers)} layers{cost}: relative error of a weight at most "
            f"{self.worst:.2e}; {self.backup_bytes / 2**20:.1f} MiB of CPU memory hold the weights as they were"
        )


def merge_adapter(model: nn.Module, adapter_names: str | Sequence[str] | None = None) -> MergeReport:
    """Add adapters' updates to the base weights, so that they cost nothing at inference.

    While merged, the model runs these adapters and no others, and with them their modules_to_save; switching, adding,
    deleting and, in training mode, a backward are refused; saving an adapter works. The model's own state dict holds
    the merged weights beside the matrices: load it only into a model merged alike.

    Args:
        model: a model with adapters.
        adapter_names: which; by default the active ones.
    Returns:
        The error of each layer, and the memory that unmerging needs.
    Raises:
        AdapterError: if there is no such adapter, one is merged already or disabled, two of these train one module as
            a whole, or a base weight cannot take it: tied to another module, without values, or used in ways that a sum
            of weights does not follow.
        NonFiniteError: if a merged weight would hold NaN or infinity.
        In any case, and where memory runs out or it is interrupted, the model is left as it was.
    """
    return _merge(model, _merging_names(model, adapter_names))


def unmerge_adapter(model: nn.Module) -> None:
    """Restore the weights as they were before merge_adapter, bit for bit.

    Args:
        model: a model with merged adapters; changed in place.
    Raises:
        AdapterError: if nothing is merged.
    """
    if not merged_names(model):
        raise AdapterError("unmerge_adapter: nothing is merged; call merge_adapter(model) first")
    shared_out(model)
    _take_out(model)


def _take_out(model: nn.Module) -> None:
    """Restore what is merged; stopped half way, it is asked for the rest again."""
    active = active_names(model)
    for part in parts(model).values():
        if isinstance(part, AdapterLayer) and part.merged and part.merged.backup:
            part.restore_weight(part.merged.backup)
        part.merged = None
        part.activate(active)


def merge_and_unload(model: nn.Module, adapter_names: str | Sequence[str] | None = None) -> nn.Module:
    """Merge adapters for good and return the model without any adapter module.

    Args:
        model: a model with adapters, merged or not; changed in place.
        adapter_names: which to merge; by default the merged or active ones. The others are dropped.
    Returns:
        model, with plain layers; modules_to_save become the trained ones.
    Raises:
        AdapterError, NonFiniteError: as merge_adapter.
    """
    already = merged_names(model)
    if already:
        if adapter_names is not None and chosen_names(adapter_names) != already:
            raise AdapterError(
                f"merge_and_unload({adapter_names!r}): {list(already)} is merged; call unmerge_adapter(model) first"
            )
        # other adapters' starts belong into the weight before the update is added and rounded
        unmerge_adapter(model)
        adapter_names = already
    names = _merging_names(model, adapter_names)
    mergeable_layers(model, names)
    activate(model, names)
    # each with all that is done to it: stopped half way, the model computes the same, and is asked for the rest again
    for module, where in places(model).items():
        if isinstance(module, AdapterLayer):
            _unload(model, module, where, names)
        elif isinstance(module, TrainableCopy):
            replace(model, where, module.module_of(names).requires_grad_(False))
    tidy(model)
    return model


@torch.no_grad()
def _unload(model: nn.Module, layer: AdapterLayer, where: list[str], names: tuple[str, ...]) -> None:
    for other in [n for n in layer.adapters if n not in names]:
        layer.remove(other)
    if layer.adapters:
        with layer.unchanged_on_failure():
            layer.write_weight(merged_weight(layer, names))
            try:
                replace(model, where, layer.base_layer)
            except BaseException:
                replace(model, where, layer)
                raise
    else:
        replace(model, where, layer.base_layer)


def _merge(model: nn.Module, names: tuple[str, ...]) -> MergeReport:
    layers = mergeable_layers(model, names)
    try:
        report = {name: _merge_layer(layer, names) for name, layer in layers.items()}
        active = active_names(model)
        for part in parts(model).values():
            # what has no part in these adapters runs no other while they are merged
            part.merged = part.merged or Merged(names)
            part.activate(active)
    except BaseException:
        _take_out(model)
        raise
    held = sum(layer.merged.backup_bytes for layer in layers.values() if layer.merged)
    return MergeReport(names, report, held)


@torch.no_grad()
def _merge_layer(layer: AdapterLayer, names: tuple[str, ...]) -> LayerMerge:
    update, before = update_of(layer, names), layer.read_weight().clone()
    # kept before anything is written: to restore what was not written does no harm
    layer.merged = Merged(names, layer.backup_weight())
    layer.write_weight(before + update)
    return _measured(before, update, layer.read_weight(), isinstance(layer, LoraNF4Linear))


def _measured(before: Tensor, update: Tensor, merged: Tensor, requantized: bool) -> LayerMerge:
    """Compare in float64, some rows at a time: whole, it would take several times the memory of the weight."""
    rows = max(1, COMPARED // max(1, before[:1].numel()))
    norms, largest = [], 0.0
    # what processes share is not split: that would have each hold it whole
    parts = ((t,) if is_sharded(t) else t.split(rows) for t in (before, update, merged))
    for old, change, new in zip(*parts, strict=True):
        truth = old.double() + change
        error = new.double() - truth
        norms.append((error.norm(), truth.norm()))
        largest = max(largest, error.abs().max().item() if error.numel() else 0.0)
    error, truth = (torch.stack(each).norm() for each in zip(*norms, strict=True))
    return LayerMerge((error / truth if truth else error).item(), largest, requantized)


def _merging_names(model: nn.Module, given: str | Sequence[str] | None) -> tuple[str, ...]:
    require_editable(model, "merge")
    names = active_names(model) if given is None else chosen_names(given)
    if not names:
        raise AdapterError("merge_adapter: no adapter is active; name one, or call set_adapter(model, name) first")
    require_adapters(model, names)
    refuse_rivals(model, names)
    shared_out(model)
    return names
