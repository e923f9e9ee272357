"""The mask of dropout."""

from typing import Any

import numpy as np

from lora_core.cpu.compiled.jit import compiled
from lora_core.cpu.compiled.share import share
from lora_core.reference import dropout as reference

MULTIPLIER_1, MULTIPLIER_2 = np.uint32(reference.MULTIPLIER_1), np.uint32(reference.MULTIPLIER_2)
FIFTEEN, SIXTEEN = np.uint32(15), np.uint32(16)


@compiled
def _mask(row_hash: np.ndarray, least: int, mask: np.ndarray, first: int, last: int) -> None:
    for m in range(first, last):
        row, dropped = row_hash[m], mask[m]
        for k in range(dropped.size):
            # Numba computes in 64 bits unless told each time; so that a vector has twice as many numbers
            h = np.uint32(row ^ np.uint32(k))
            h = np.uint32((h ^ (h >> SIXTEEN)) * MULTIPLIER_1)
            h = np.uint32((h ^ (h >> FIFTEEN)) * MULTIPLIER_2)
            dropped[k] = np.uint32(h ^ (h >> SIXTEEN)) < least


@compiled
def mask(openmp: int, threads: int, counter: np.ndarray, step: int, count: int, *arguments: Any) -> None:
    """Say of ranges of rows which elements are dropped.

    Arguments:
        row_hash: uint32 [M], every row's and the seed's.
        least: uint32, the hash from which on an element is kept.
        mask: bool [M, K].
    """
    share(_mask, openmp, threads, counter, step, count, arguments)
