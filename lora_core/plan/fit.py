"""Does it fit, and what is the most that does."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lora_core.errors import ConfigError
from lora_core.plan.memory import plan_memory
from lora_core.plan.setup import Setup
from lora_core.plan.shape import ModelShape

# no search goes further; a batch or rank of this size is never what is limited
SEARCH_END = 2**20


@dataclass(frozen=True)
class Fit:
    """What fits on a card.

    Args:
        budget_bytes: the card's memory.
        total_bytes: what the setup takes.
        largest_rank: the greatest rank that fits, all else equal; None for full fine-tuning.
        largest_batch: the same for the batch.
        largest_sequence: the same for the sequence.
    Each is 0 where even 1 does not fit.
    """

    budget_bytes: int
    total_bytes: int
    largest_rank: int | None
    largest_batch: int
    largest_sequence: int

    @property
    def fits(self) -> bool:
        """The setup as it stands takes no more than the card has."""
        return self.total_bytes <= self.budget_bytes


def fit(shape: ModelShape, setup: Setup, budget_bytes: int) -> Fit:
    """Whether a setup fits into a budget, and how far each of its sizes could go alone.

    The rank goes up to the widest that an adapter can use, the smaller side of the largest adapted layer.

    Raises:
        ConfigError: if the budget is not positive, or a target is none of the model's layers.
    """
    if not budget_bytes > 0:
        raise ConfigError(f"the budget is {budget_bytes} bytes; want more than 0")

    def holds(**change: Any) -> bool:
        return plan_memory(shape, replace(setup, **change)).total_bytes <= budget_bytes

    ranks = None
    if not setup.trains_all:
        widest = max(min(layer.rows, layer.columns) for layer in shape.targets(setup.targets))
        ranks = _largest(lambda rank: holds(rank=rank), widest)
    return Fit(
        budget_bytes,
        plan_memory(shape, setup).total_bytes,
        ranks,
        _largest(lambda batch: holds(batch=batch), SEARCH_END),
        _largest(lambda sequence: holds(sequence=sequence), SEARCH_END),
    )


def _largest(holds: Callable[[int], bool], end: int) -> int:
    """The greatest n of 1 to end for which holds(n), which is true up to some n and false beyond; 0 if none."""
    low, high = 0, end + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
