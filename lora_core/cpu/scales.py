"""The scales of an NF4 weight as loops take them."""

from typing import NamedTuple

import numpy as np
from torch import Tensor


class Scales(NamedTuple):
    """float32 scales in NumPy. Where they are codes themselves, decode_scales of the loops makes a range at a time.

    Args:
        values: float32 [b].
        codes: uint8 [b]; none where the values are the scales already.
        absmax2: float32 [ceil(b / block_size)].
        offset: float32 [1].
        block_size: scales sharing one second-level scale.
    """

    values: np.ndarray
    codes: np.ndarray
    absmax2: np.ndarray
    offset: np.ndarray
    block_size: int

    @classmethod
    def of(
        cls, absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None, block_size: int
    ) -> "Scales":
        """Return those of a weight, sharing its memory: of scales [b] in float32, or of uint8 codes of them."""
        given = absmax.numpy().ravel()
        if nested_absmax is None or nested_offset is None:
            return cls(given, *NONE, block_size)
        nested = nested_absmax.numpy().ravel(), nested_offset.numpy().ravel()
        return cls(np.empty(given.size, np.float32), given, *nested, block_size)


NONE = np.empty(0, np.uint8), np.empty(0, np.float32), np.zeros(1, np.float32)
