"""The scales of an NF4 weight as loops take them."""

from typing import Any

import numpy as np
from torch import Tensor


class Scales:
    """float32 scales [b] in NumPy, decoded a range at a time where they are codes themselves.

    Args:
        absmax: float32 [b], or uint8 codes of it.
        nested_absmax: float32 [ceil(b / block_size)], or None.
        nested_offset: float32, one element, or None.
        block_size: scales sharing one second-level scale.
    """

    def __init__(self, absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None, block_size: int):
        self.values = absmax.numpy().ravel()
        self._nested = None
        if nested_absmax is not None and nested_offset is not None:
            offset = nested_offset.numpy().ravel()
            self._nested = self.values, nested_absmax.numpy().ravel(), offset, block_size
            self.values = np.empty(self.values.size, np.float32)

    def decode(self, loops: Any, first: int, last: int) -> None:
        """Make values first to last the scales; threads may do so for overlapping ranges.

        Args:
            loops: lora_core.cpu.compiled.nf4 or lora_core.cpu.plain.nf4.
        """
        if self._nested is not None:
            loops.decode_absmax(*self._nested, self.values, first, last)
