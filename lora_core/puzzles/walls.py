"""Operands and results with memory around them that a kernel has no business in."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lora_core.puzzles.compare import WrongAnswer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# elements before and behind
GUARD = 64
UNTOUCHED = -123.0

# first address and the one behind the last, of all walls; held, so that no other memory takes their place
_walls: list[tuple[int, int, Tensor]] = []
# addresses inside walls that were read
_read: set[int] = set()
# first and last address, and elements, of every load
_loads: list[tuple[int, int, int]] = []


def _inside(room: Tensor, count: int) -> Tensor:
    """Return the part of a buffer between its walls, which are noted."""
    size, start = room.element_size(), room.data_ptr()
    for first, length in ((0, GUARD), (GUARD + count, GUARD)):
        _walls.append((start + first * size, start + (first + length) * size, room))
    return room[GUARD : GUARD + count]


def walled(tensor: Tensor) -> Tensor:
    """Return the tensor as a view with walls around it: NaN, or the largest whole number."""
    filler = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    room = torch.full((tensor.numel() + 2 * GUARD,), filler, device=DEVICE, dtype=tensor.dtype)
    view = _inside(room, tensor.numel())
    view.copy_(tensor.flatten())
    return view.view(tensor.shape)


def blank(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Callable[[str], None]]:
    """Return an untouched result, and what raises unless its surroundings stayed untouched and it did not."""
    count = int(torch.tensor(shape).prod())
    room = torch.full((count + 2 * GUARD,), UNTOUCHED, device=DEVICE, dtype=dtype)
    inside = _inside(room, count)

    def check(given: str) -> None:
        if count and bool((inside == UNTOUCHED).all()):
            raise WrongAnswer(f"{given}: your kernel wrote nothing: is its body still empty?")
        if bool((room[:GUARD] != UNTOUCHED).any() | (room[GUARD + count :] != UNTOUCHED).any()):
            raise WrongAnswer(f"{given}: your kernel wrote beyond the result: mask the store as well")
        left = int((inside == UNTOUCHED).sum())
        if left:
            raise WrongAnswer(
                f"{given}: {left} of {count} elements were never written: does every program do its own part?"
            )

    return inside.view(shape), check


@contextmanager
def watched_loads() -> Iterator[None]:
    """Note what Triton's interpreter loads, and what of it lies inside walls; a GPU tells nobody."""
    from triton.runtime.interpreter import InterpreterBuilder

    load = InterpreterBuilder.create_masked_load

    def noting(builder: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        wanted = ptrs.data[mask.data.astype(bool)]
        if wanted.size:
            first, last = int(wanted.min()), int(wanted.max())
            _loads.append((first, last, ptrs.data.size))
            for start, stop, _ in _walls:
                if first < stop and last >= start:
                    _read.update(wanted[(wanted >= start) & (wanted < stop)].tolist())
        return load(builder, ptrs, mask, *rest)

    _walls.clear()
    _read.clear()
    _loads.clear()
    InterpreterBuilder.create_masked_load = noting
    try:
        yield
    finally:
        InterpreterBuilder.create_masked_load = load


def loads_of(tensor: Tensor) -> set[int]:
    """Return how many elements the loads of a tensor had, masked ones too; none where nobody watched."""
    start = tensor.data_ptr()
    stop = start + tensor.numel() * tensor.element_size()
    return {size for first, last, size in _loads if first < stop and last >= start}


def forget_reads() -> None:
    """Forget what was read inside walls: another run begins."""
    _read.clear()


def refuse_reads(given: str) -> None:
    """Raise WrongAnswer if a kernel has read inside a wall: the results are right, as it used nothing of that."""
    if _read:
        raise WrongAnswer(
            f"{given}: right, but your kernel reads beyond the end of an operand, {len(_read)} elements in all, where "
            "on a GPU may be no memory of yours: mask the load as well"
        )
