"""Comparing a learner's result with the right one, and guessing what went wrong."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

UNIT_FP32 = 2.0**-24


class WrongAnswer(Exception):
    """An exercise is not solved; the message says what came out, what was expected, and what may be behind it."""


def rounding(magnitude: Tensor, products: int) -> Tensor:
    """Return how far two float32 computations of a sum of so many products may be apart.

    Args:
        magnitude: the formula on absolute values, in float64.
        products: summed for one element.
    Source: Higham 2002, section 3.1: (n + 2) roundings of half a spacing, in either computation.
    """
    return 2 * (products + 2) * UNIT_FP32 * magnitude + 2.0**-126


def compare(
    got: Any, want: Tensor, room: Tensor | float, given: str, guesses: Sequence[tuple[Tensor | None, str]] = ()
) -> None:
    """Raise WrongAnswer unless got is want, to the bit where room is 0.

    Args:
        got: what the learner returned.
        want: the right result.
        room: by how much an element may differ.
        given: the input in words.
        guesses: results of common mistakes, with what to say where got is one of them; None is never got.
    """
    if not isinstance(got, Tensor):
        raise WrongAnswer(f"{given}: you returned a {type(got).__name__}; want a tensor of shape {tuple(want.shape)}")
    if got.shape != want.shape:
        raise WrongAnswer(f"{given}: your result has shape {tuple(got.shape)}; want {tuple(want.shape)}")
    if got.dtype != want.dtype:
        raise WrongAnswer(f"{given}: your result is {got.dtype}; want {want.dtype}")
    if near(got, want, room):
        return
    for guess, message in guesses:
        if guess is not None and guess.shape == got.shape and resembles(got, guess.to(got.dtype), want, room):
            raise WrongAnswer(f"{given}: {message}")
    difference = (got.double() - want.double()).abs().nan_to_num(nan=torch.inf)
    place = tuple(int(i) for i in torch.unravel_index(difference.argmax(), got.shape))
    wrong = int((~within(got, want, room)).sum())
    raise WrongAnswer(
        f"{given}: {wrong} of {got.numel()} elements are wrong; furthest off at {list(place)}, where you have "
        f"{got[place].item():.6g} and {want[place].item():.6g} is right"
    )


def within(got: Tensor, want: Tensor, room: Tensor | float) -> Tensor:
    """Return, element by element, whether got is within room of want; NaN is not."""
    return (got.double() - want.double()).abs() <= room


def near(got: Tensor, want: Tensor, room: Tensor | float) -> bool:
    """Say whether all elements are within room."""
    return bool(within(got, want, room).all())


def resembles(got: Tensor, guess: Tensor, want: Tensor, room: Tensor | float) -> bool:
    """Say whether got is the result of a mistake, to the bit where room is 0.

    Room is that of the right result: where the mistake adds what does not belong there, its sums are larger and are
    rounded further. So the largest room of any element counts, in proportion to the sizes of the two results.
    """
    largest = float(torch.as_tensor(room).max())
    sizes = [float(t.double().abs().nan_to_num().max()) for t in (guess, want)]
    return near(got, guess, largest * max(1.0, sizes[0] / sizes[1]) if sizes[1] else largest)
