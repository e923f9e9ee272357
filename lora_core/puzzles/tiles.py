"""Running a kernel under unequal block sizes, and guessing which of them stands where another is meant."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lora_core.puzzles.compare import WrongAnswer
from lora_core.puzzles.load import describe_loaded
from lora_core.puzzles.walls import forget_reads, loads_of

Sizes = dict[str, int]


def check_blocks(run: Callable[[Sizes], Any], equal: Sizes, larger: Sequence[int], meaning: Mapping[str, str]) -> None:
    """Run a kernel with its block sizes as they are, then with each in turn larger than the others.

    Args:
        run: runs it with these block sizes; raises WrongAnswer unless all is right.
        equal: the block sizes by name, all the same, so that one may stand where another is meant.
        larger: sizes of the one that is larger.
        meaning: what each is for.
    Raises:
        WrongAnswer: if only unequal ones go wrong, with those that were probably mixed up.
    """
    run(equal)
    for name, size in itertools.product(equal, larger):
        fault = _fault(run, equal | {name: size})
        if fault:
            raise WrongAnswer(f"{fault}\n  {_guess(run, equal, name, size, meaning)}")


def _fault(run: Callable[[Sizes], Any], sizes: Sizes) -> str:
    """Return what goes wrong with these block sizes, or nothing."""
    forget_reads()
    try:
        run(sizes)
    except WrongAnswer as wrong:
        return str(wrong)
    except Exception as error:
        return f"{in_words(sizes)}: {describe_loaded(error)}"
    return ""


def _guess(run: Callable[[Sizes], Any], equal: Sizes, name: str, size: int, meaning: Mapping[str, str]) -> str:
    """Return what is probably behind a fault that comes with one larger block size.

    A kernel that takes one for another is right again where these two are equal.
    """
    others = [other for other in equal if other != name]
    before = f"With {'all block sizes' if others else name} {equal[name]} it is right: "
    for other in others:
        if not _fault(run, equal | {name: size, other: size}):
            return (
                f"{before}{name} and {other} are probably mixed up. {name} is for {meaning[name]}, {other} for "
                f"{meaning[other]}"
            )
    if others and not _fault(run, dict.fromkeys(equal, size)):
        each = ", ".join(f"{other} for {meaning[other]}" for other in equal)
        return f"{before}block sizes are probably mixed up, {name} among them. They are {each}"
    return f"{before}is a number written where {name} is meant? It is for {meaning[name]}"


def in_words(sizes: Sizes) -> str:
    """Return block sizes in words."""
    return ", ".join(f"{name} = {size}" for name, size in sizes.items())


def refuse_tile(what: str, operand: Tensor, names: tuple[str, str], sizes: Sizes, given: str) -> None:
    """Raise WrongAnswer if an operand was loaded in tiles of another size than its own; a GPU tells nobody.

    The result may well be right: a sum is the same in steps of any length.
    """
    height, width = (sizes[name] for name in names)
    loads = loads_of(operand)
    if loads and height * width not in loads and max(loads) > height:
        raise WrongAnswer(
            f"{given}: right, but {what} is loaded {max(loads)} elements at a time; want tiles of "
            f"{names[0]} x {names[1]}, {height * width}"
        )
