"""delete_adapter: remove an adapter from a model."""

from torch import nn

from lora_core.adapt.switch import activate, active_names
from lora_core.adapt.walk import require_adapters, require_editable
from lora_core.adapt.withdraw import withdraw


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter; where none is left, the original layer comes back. The other active ones stay active.

    Biases that it trained are the base's own: they stay as they are, and are frozen again. What an adapter started by
    "pissa" or "olora" had taken out of the base weight is put back, to rounding: of a 4-bit weight to that of 4 bits.

    Args:
        model: a model with this adapter; changed in place.
        adapter_name: which.
    Raises:
        AdapterError: if there is no such adapter, one is merged, or adapters are disabled for a while.
    """
    require_adapters(model, [adapter_name])
    require_editable(model, f"delete adapter {adapter_name!r}")
    withdraw(model, adapter_name)
    # biases that it alone trained are frozen again
    activate(model, active_names(model))
