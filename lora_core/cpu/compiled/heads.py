"""Rows of numbers, one for each head and token of each sequence, as they lie in memory, and copies of some of them."""

from typing import Any, NamedTuple

import numpy as np

from lora_core.cpu.compiled.jit import contracted
from lora_core.cpu.compiled.tile import LANES


class Heads(NamedTuple):
    """Rows of float32 in an array: how far apart those of sequences, heads and tokens begin, each one without gaps."""

    data: Any
    batch: int
    head: int
    token: int


@contracted
def place(x: Heads, b: int, h: int, t: int) -> int:
    """Return where the row of a head and token begins."""
    return b * x.batch + h * x.head + t * x.token


@contracted
def row(x: Heads, b: int, h: int, t: int, size: int) -> np.ndarray:
    """Return the row of a head and token, of so many numbers."""
    begin = place(x, b, h, t)
    return x.data[begin : begin + size]


@contracted
def _copy(x: np.ndarray, out: np.ndarray) -> None:
    for i in range(x.size):
        out[i] = x[i]


@contracted
def gather(x: Heads, b: int, h: int, first: int, last: int, out: np.ndarray) -> None:
    """Write rows of a head, of some tokens, to the first ones of out."""
    for t in range(first, last):
        _copy(row(x, b, h, t, out.shape[1]), out[t - first])


@contracted
def scatter(x: np.ndarray, b: int, h: int, out: Heads) -> None:
    """Write all rows of x to a head."""
    for t in range(len(x)):
        _copy(x[t], row(out, b, h, t, x.shape[1]))


@contracted
def transpose(x: np.ndarray, out: np.ndarray) -> None:
    """Write the rows of x to the first columns of out."""
    tokens, size = x.shape
    for begin in range(0, tokens, LANES):
        end = min(begin + LANES, tokens)
        some = x[begin:end]
        for d in range(size):
            row = out[d, begin:end]
            for t in range(row.size):
                row[t] = some[t, d]
