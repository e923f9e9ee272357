"""The parts of an NF4 weight in the order in which the operations take them, and lists of weights, dense or NF4."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_core.errors import ConfigError
from lora_core.ops.eager import call
from lora_core.ops.nf4_dequantize import op as dequantize
from lora_core.quant import QuantizedWeight


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

    @classmethod
    def of(cls, q: QuantizedWeight) -> "Packed":
        """Return the parts of an NF4 weight of two dimensions, sharing its memory.

        Raises:
            ConfigError: if it is quantised as something else.
        """
        if q.quant_type != "nf4":
            raise ConfigError(f"the weight is quantised as {q.quant_type!r}; want 'nf4': use q.dequantize() instead")
        return cls(*q.parts, q.shape, q.block_size, q.nested_block_size)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the weight, shape [N, K]."""
        w: Tensor = call(dequantize, *self[:5], dtype, *self[5:])
        return w


def flatten(weights: Sequence[Tensor | Packed]) -> tuple[list[Tensor], list[int]]:
    """Return weights as an operation's schema can hold them: their tensors, and FORMAT integers for each weight."""
    tensors: list[Tensor] = []
    formats: list[int] = []
    for w in weights:
        if isinstance(w, Tensor):
            tensors.append(w)
            # torch.jit.trace gives sizes as tensors, which no list of integers takes
            formats += [1, *(map(int, w.shape) if torch.jit.is_tracing() else w.shape), 0, 0]
        else:
            parts = [t for t in w[:4] if t is not None]
            tensors += parts
            formats += [len(parts), *w.shape, w.block_size, w.nested_block_size]
    return tensors, formats


# of a weight in flatten: how many tensors it has, N, K, block size, second-level block size
FORMAT = 5


def unflatten(tensors: Sequence[Tensor], formats: Sequence[int]) -> Iterator[Tensor | Packed]:
    """Yield the weights that flatten was given."""
    first = 0
    for place in range(0, len(formats), FORMAT):
        count, n, k, block_size, nested_block_size = formats[place : place + FORMAT]
        parts = tensors[first : first + count]
        first += count
        if count == 1:
            yield parts[0]
        else:
            nested_absmax, nested_offset = parts[2:] if count == 4 else (None, None)
            yield Packed(parts[0], parts[1], nested_absmax, nested_offset, (n, k), block_size, nested_block_size)


def dense(w: Tensor | Packed, dtype: torch.dtype) -> Tensor:
    """Return a weight, shape [N, K], dequantised where it is packed."""
    return w if isinstance(w, Tensor) else w.dense(dtype)
