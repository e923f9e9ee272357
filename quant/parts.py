"""What the parts of a 4-bit weight have to be to belong together."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_core.dtypes import FLOATS
from lora_core.errors import ConfigError, DeviceError, DtypeError, ShapeError
from lora_core.quant.blockwise import check_block_size, check_nested_block_size

FOUR_BIT = ("nf4", "fp4", "int4")


def check_parts(
    owner: str,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    block_size: int,
    nested_block_size: int,
) -> None:
    """Raise unless these describe a weight of this shape: whoever reads them by the byte would read past an end.

    Args:
        owner: who asks, for the message.
        codes: uint8, (n + 1) // 2 elements.
        absmax: float32, ceil(n / block_size) elements, or uint8 where the scales are quantised.
        nested_absmax: float32, ceil(len(absmax) / nested_block_size) elements where they are, else None.
        nested_offset: float32, one element where they are, else None.
        shape: of the weight, n elements.
        block_size: elements sharing one scale.
        nested_block_size: scales sharing one second-level scale.
    Raises:
        ShapeError, DtypeError, DeviceError, ConfigError: saying which part does not fit.
    """
    check_block_size(owner, block_size)
    check_nested_block_size(owner, nested_block_size)
    if (nested_absmax is None) != (nested_offset is None):
        raise ShapeError(f"{owner}: nested_absmax and nested_offset go together; got only one of them")
    if any(side < 0 for side in shape):
        raise ShapeError(f"{owner}: shape {tuple(shape)} has a negative side")
    n = math.prod(shape)
    blocks = -(-n // block_size)
    wanted = [("codes", codes, -(-n // 2), torch.uint8)]
    if nested_absmax is None or nested_offset is None:
        wanted += [("absmax", absmax, blocks, torch.float32)]
    else:
        wanted += [
            ("absmax", absmax, blocks, torch.uint8),
            ("nested_absmax", nested_absmax, -(-blocks // nested_block_size), torch.float32),
            ("nested_offset", nested_offset, 1, torch.float32),
        ]
    for name, tensor, size, dtype in wanted:
        if not isinstance(tensor, Tensor):
            raise DtypeError(f"{owner}: {name} is a {type(tensor).__name__}; want a torch.Tensor")
        if tensor.numel() != size:
            raise ShapeError(
                f"{owner}: {name} has {tensor.numel()} elements; a weight of shape {tuple(shape)} in blocks of "
                f"{block_size} wants {size}"
            )
        if tensor.dtype != dtype:
            raise DtypeError(f"{owner}: {name} is {tensor.dtype}; want {dtype}")
        if tensor.device != codes.device:
            raise DeviceError(f"{owner}: {name} is on {tensor.device}, codes on {codes.device}: want one device")


def check_dtype(what: str, dtype: object) -> None:
    """Raise DtypeError, which begins with what, unless a weight can be of this dtype."""
    if dtype not in FLOATS:
        raise DtypeError(f"{what} {dtype!r}; want one of {', '.join(map(str, FLOATS))}")


def check_four_bit(quant_type: object) -> None:
    """Raise ConfigError unless a weight can be quantised as this."""
    if quant_type not in FOUR_BIT:
        raise ConfigError(f"quant_type is {quant_type!r}; want one of {', '.join(FOUR_BIT)}")
