"""Loops that Numba compiles, bit-equal to their NumPy forms; imported where worth it only, as that takes time."""

import functools
import importlib
import importlib.util
import sys
from typing import Any

# elements from which on a call whose result is the same either way is worth loading Numba for: it takes 0.3 s, and
# 1.5 s more where nothing is kept yet
WORTHWHILE = 2**18


def load_for(name: str, elements: int) -> Any:
    """Return a module of this folder where it is there already or worth loading for so many elements, else None."""
    # load waits for a module that another thread is importing
    there = f"{__name__}.{name}" in sys.modules
    return load(name) if there or elements >= WORTHWHILE else None


@functools.cache
def load(name: str) -> Any:
    """Return a module of this folder, or None where Numba is not installed or does not run."""
    try:
        return importlib.import_module(f"{__name__}.{name}") if importlib.util.find_spec("numba") else None
    # a Numba that does not go with this NumPy, without its compiler, switched off, or refused by who watches imports
    except (ImportError, ValueError):
        return None
