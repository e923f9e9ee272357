"""What a list of names, or an expression, means: PEFT's rules."""

import re
from collections.abc import Collection, Iterator, Sequence

ALL_LINEAR = "all-linear"


def matches(name: str, wanted: Collection[str] | str) -> bool:
    """Say whether a module name is one of the wanted."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(ending in wanted for ending in endings(name))


def inside_any(name: str, wanted: Collection[str]) -> bool:
    """Say whether a module, or one that it lies inside, is one of the wanted."""
    steps = name.split(".")
    return any(matches(".".join(steps[: i + 1]), wanted) for i in range(len(steps)))


def endings(name: str) -> Iterator[str]:
    """Yield all that an entry of a list may say to mean this name: itself, and what is behind each of its dots."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name


def first_few(names: Sequence[str], shown: int) -> str:
    """Return the first names as a message tells them, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
