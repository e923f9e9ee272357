"""How the loops of this folder are compiled, and kept from one process to the next."""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import config, njit

from lora_core.cpu import scales
from lora_core.quant import codebook
from lora_core.reference import dropout

# what loops are made from beside the files of this folder: levels, the places of a tuple's fields, multipliers
OTHERS = Path(codebook.__file__), Path(scales.__file__), Path(dropout.__file__)
# instructions of the processor have no form in Python
if getattr(config, "DISABLE_JIT", False):
    raise ImportError("Numba is switched off by NUMBA_DISABLE_JIT")


def contracted(function: Callable[..., Any]) -> Any:
    """Return compiled(function) where a product and the sum it enters are rounded once."""
    return compiled(function, frozenset({"contract"}))


def reordered(function: Callable[..., Any]) -> Any:
    """Return compiled(function) whose sums are added in another order, vectors of them, and products as they fall.

    The same on every call on one machine. For what does nothing else: a reordered product may overflow.
    """
    return compiled(function, frozenset({"contract", "reassoc"}))


def compiled(function: Callable[..., Any], freedom: frozenset[str] = frozenset()) -> Any:
    """Return the function, compiled at its first call; other threads run on beside it.

    Each float32 operation is rounded on its own, but for the freedom given: no fused multiply-add, no reordering. What
    is compiled is kept, where there is a place for it, until a file changes that it was made from.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    if freedom:
        options["fastmath"] = set(freedom)
    try:
        made = njit(cache=True, **options)(function)
    except RuntimeError:  # nowhere to keep the result: neither beside the file nor in the user's folder
        return njit(**options)(function)
    # Numba looks at the function's own file alone
    kept: Any = getattr(getattr(made, "_cache", None), "_cache_file", None)
    if not hasattr(kept, "_source_stamp"):
        return njit(**options)(function)
    kept._source_stamp = kept._source_stamp, stamp()
    return made


@functools.cache
def stamp(files: tuple[Path, ...] = (*sorted(Path(__file__).parent.glob("*.py")), *OTHERS)) -> str:
    """Return what changes with any of the files that loops are made from."""
    parts = hashlib.sha256()
    for path in files:
        parts.update(hashlib.sha256(path.read_bytes()).digest())
    return parts.hexdigest()
