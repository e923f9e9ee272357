"""Loops that Numba compiles, bit-equal to their NumPy forms; imported where worth it only, as that takes time."""

import functools
import importlib
import importlib.util
import sys
import warnings
from typing import Any

# elements from which on a call whose result is the same either way is worth loading Numba for: it takes 0.3 to 0.9 s,
# and 1.5 s more where nothing is kept yet
WORTHWHILE = 2**18
# elements that smaller calls have to add up to: by then they have taken about as long. A call takes as long as so many
# elements even if it has none
WORTHWHILE_TOGETHER, OF_A_CALL = 2**27, 2**16
_asked = 0


def load_for(name: str, elements: int) -> Any:
    """Return a module of this folder where it is there already or worth loading for so many elements, else None.

    Small calls add up, over all that are made.
    """
    global _asked
    # load waits for a module that another thread is importing
    if f"{__name__}.{name}" not in sys.modules and elements < WORTHWHILE:
        # a count that another thread has just overwritten comes a call later
        _asked += elements + OF_A_CALL
        if _asked < WORTHWHILE_TOGETHER:
            return None
    return load(name)


def load_all() -> None:
    """Load the loops of every operation, as those who want to know whether they are right do."""
    for name in ("causal_attention", "dropout", "nf4", "nf4_product", "rms_norm", "rotary", "swiglu"):
        load(name)


@functools.cache
def load(name: str) -> Any:
    """Return a module of this folder, or None where Numba is not installed or does not run."""
    try:
        return importlib.import_module(f"{__name__}.{name}") if importlib.util.find_spec("numba") else None
    # a Numba that does not go with this NumPy, without its compiler, switched off, refused by who watches imports, or
    # half imported, as by an import that was interrupted
    except Exception as error:
        if not isinstance(error, (ImportError, ValueError)):
            warnings.warn(
                f"Numba cannot be used in this process ({type(error).__name__}: {error}): what its loops "
                "do for 4-bit weights and dropout is done by NumPy and PyTorch, more slowly",
                RuntimeWarning,
                stacklevel=2,
            )
        return None
