"""How the loops of this folder are compiled."""

from collections.abc import Callable
from typing import Any

from numba import config, njit

# instructions of the processor have no form in Python
if getattr(config, "DISABLE_JIT", False):
    raise ImportError("Numba is switched off by NUMBA_DISABLE_JIT")


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """Return the function, compiled at its first call; other threads run on beside it.

    Each float32 operation is rounded on its own: no fused multiply-add, no reordering.
    """
    options |= {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # nowhere to keep the result: neither beside the file nor in the user's folder
        return njit(**options)(function)


def reordered(function: Callable[..., Any]) -> Any:
    """Return the function compiled likewise, its sums in whatever order is fastest, with fused multiply-adds."""
    return compiled(function, fastmath={"reassoc", "contract"})
