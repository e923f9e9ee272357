"""Two 4-bit codes in a byte: element 2i in the high half, 2i + 1 in the low half, as bitsandbytes packs them."""

import torch
from torch import Tensor


def pack(codes: Tensor, filler: int = 0) -> Tensor:
    """Return codes [n], uint8 below 16, as bytes [(n + 1) // 2]; an odd last one is followed by the filler.

    bitsandbytes fills up with zeros before it quantises, so its filler is the code of zero.
    """
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_full((1,), filler)])
    return codes[::2] << 4 | codes[1::2]


def unpack(packed: Tensor, count: int) -> Tensor:
    """Return the first count codes, uint8 [count], of packed bytes of any shape."""
    flat = packed.reshape(-1)
    return torch.stack([flat >> 4, flat & 15], dim=1).reshape(-1)[:count]
