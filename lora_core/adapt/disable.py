"""disable_adapter: run the base model for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lora_core.adapt.merge import merge_adapter, unmerge_adapter
from lora_core.adapt.walk import merged_names, parts
from lora_core.errors import AdapterError


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Run the base model inside the with block; merged adapters are taken out of the weights and put back after.

    Biases trained with bias="all" or "lora_only" are part of the base layers and stay as they are. Inside the block
    adapters are neither added, switched, merged nor deleted.

    Args:
        model: a model with adapters.
    Returns:
        A context manager that gives the model.
    Raises:
        AdapterError: if the model has no adapters.
    """
    before = {part: part.enabled for part in parts(model).values()}
    if not before:
        raise AdapterError("disable_adapter: the model has no adapters; add one with add_adapter or load_adapter")
    merged = merged_names(model)
    if merged:
        unmerge_adapter(model)
    for part in before:
        part.enabled = False
    try:
        yield model
    finally:
        for part, enabled in before.items():
            part.enabled = enabled
        if merged:
            merge_adapter(model, merged)
