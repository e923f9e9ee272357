"""disable_adapter: run the base model for a while."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lora_core.adapt.merge import merge_adapter, unmerge_adapter
from lora_core.adapt.walk import merged_names, parts
from lora_core.errors import AdapterError

# models with what was merged in them before the first of the blocks that they are in
_to_merge: weakref.WeakKeyDictionary[nn.Module, tuple[str, ...]] = weakref.WeakKeyDictionary()


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Run the base model inside the with block; merged adapters are taken out of the weights and put back after.

    Biases trained with bias="all" or "lora_only" are part of the base layers and stay as they are. Inside the block
    adapters are neither added, switched, merged nor deleted. They are off for whoever calls the model meanwhile, in any
    thread or task, until the last of the blocks that overlap is left; a copy of the model made inside one has them on.

    Args:
        model: a model with adapters.
    Returns:
        A context manager that gives the model.
    Raises:
        AdapterError: if the model has no adapters.
    """
    inside = list(parts(model).values())
    if not inside:
        raise AdapterError("disable_adapter: the model has no adapters; add one with add_adapter or load_adapter")
    merged = merged_names(model)
    if merged:
        unmerge_adapter(model)
        _to_merge[model] = merged
    entered = []
    try:
        for part in inside:
            part.off.blocks += 1
            entered.append(part)
        yield model
    finally:
        for part in entered:
            part.off.blocks -= 1
        if model in _to_merge and not any(part.off.blocks for part in inside):
            merge_adapter(model, _to_merge.pop(model))
