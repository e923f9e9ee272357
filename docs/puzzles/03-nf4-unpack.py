"""NF4 unpack.

Two 4-bit codes share a byte: of bytes b0, b1, ... the codes are

    b0's high half, b0's low half, b1's high half, ...

    packed  uint8 [(n + 1) // 2]
    n       how many codes there are

Example: bytes 0x1F, 0x70 and n = 3 are the codes 1, 15, 7.
"""

import torch
from torch import Tensor


def unpack(packed: Tensor, n: int) -> Tensor:
    """Return the codes, uint8 of shape [n], each below 16."""
    raise NotImplementedError
