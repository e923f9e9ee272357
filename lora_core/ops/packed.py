"""The parts of an NF4 weight in the order in which the operations take them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_core.ops.nf4_dequantize import op as dequantize


class Packed(NamedTuple):
    """An NF4 weight of n elements in blocks: what a QuantizedWeight holds, or a bitsandbytes parameter.

    Args:
        codes: uint8, (n + 1) // 2 elements, two codes a byte.
        absmax: float32, one scale a block; their uint8 codes where nested_absmax is there.
        nested_absmax: float32, one scale for nested_block_size scales, or None.
        nested_offset: float32, one element, or None.
        shape: [N, K].
        block_size: weights sharing one scale.
        nested_block_size: scales sharing one second-level scale.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    shape: Sequence[int]
    block_size: int
    nested_block_size: int

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the weight, shape [N, K]."""
        w: Tensor = dequantize(*self[:5], dtype, *self[5:])
        return w
