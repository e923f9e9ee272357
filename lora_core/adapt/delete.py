"""delete_adapter: remove an adapter from a model."""

from torch import nn

from lora_core.adapt.switch import activate, active_names
from lora_core.adapt.walk import require_adapters, require_editable
from lora_core.adapt.withdraw import withdraw


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter; where none is left, the original layer comes back. The other active ones stay active.

    An adapter started by "pissa" or "olora" had taken a part out of the base weight: it is put back, to rounding.

    Raises:
        AdapterError: if there is no such adapter, one is merged, or adapters are disabled for a while.
    """
    require_adapters(model, [adapter_name])
    require_editable(model, f"delete adapter {adapter_name!r}")
    withdraw(model, adapter_name)
    # biases that it alone trained are frozen again
    activate(model, active_names(model))
