"""How a matrix can be loaded: what decides which tiles and warps a kernel takes."""

from torch import Tensor

# bytes, or elements, that addresses and sizes are multiples of where 16 bytes are loaded at once
ALIGNMENT = 16


def in_wide_loads(t: Tensor) -> bool:
    """Say whether a matrix can be loaded 16 bytes at once: one dimension contiguous, and all a multiple of 16."""
    unit = 1 if t.stride(1) == 1 else 0
    rest = (t.shape[unit], t.stride(1 - unit), t.data_ptr())
    return t.stride(unit) == 1 and not any(number % ALIGNMENT for number in rest)
