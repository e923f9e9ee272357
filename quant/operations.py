"""How quantised weights reach their operations, which stand above them in lora_core/ops."""

from collections.abc import Callable
from typing import Any


def by_the_dispatcher(operation: Any, *args: Any) -> Any:
    """Return operation(*args), one of torch.ops.lora_core."""
    return operation(*args)


# lora_core/ops/eager.py puts a shorter way here
run: Callable[..., Any] = by_the_dispatcher
