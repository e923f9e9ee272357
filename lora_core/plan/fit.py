"""Does it fit, and what is the most that does."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from lora_core.errors import ConfigError
from lora_core.plan.memory import SMALLEST_8BIT_STATE, plan_memory
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

    The rank goes up to the widest that an adapter can use, the smaller side of the largest adapted layer; the sequence
    up to the positions that the model has learned, if it has.

    Raises:
        ConfigError: if the budget is not positive, or a target is none of the model's layers.
    """
    if not budget_bytes > 0:
        raise ConfigError(f"the budget is {budget_bytes} bytes; want more than 0")

    def holds(**change: Any) -> bool:
        return plan_memory(shape, replace(setup, **change)).total_bytes <= budget_bytes

    ranks = None
    if not setup.trains_all:
        targets = shape.targets(setup.targets)
        widest = max(min(layer.rows, layer.columns) for layer in targets)
        # at these ranks a matrix of an adapter is large enough for 8-bit states, and takes less than one row fewer does
        wide_enough = {-(-SMALLEST_8BIT_STATE // side) for layer in targets for side in (layer.rows, layer.columns)}
        ranks = _largest(lambda rank: holds(rank=rank), widest, wide_enough)
    return Fit(
        budget_bytes,
        plan_memory(shape, setup).total_bytes,
        ranks,
        _largest(lambda batch: holds(batch=batch), SEARCH_END),
        _largest(lambda sequence: holds(sequence=sequence), shape.positions or SEARCH_END),
    )


def _largest(holds: Callable[[int], bool], end: int, falls: Iterable[int] = ()) -> int:
    """The greatest n of 1 to end for which holds(n); 0 if none.

    From one of `falls` to the next, holds is true up to some n and false beyond.
    """
    high = end + 1
    for start in sorted({1, *(n for n in falls if 1 < n <= end)}, reverse=True):
        low = start - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if holds(middle) else (low, middle)
        if low >= start:
            return low
        high = start
    return 0
