"""lora_core::nf4_quantize on the CPU: the code is 15 less the midpoints not below the quotient, counted in NumPy."""

import sys

import numpy as np
import torch
from torch import Tensor

from lora_core.cpu.chunks import CHUNK, run
from lora_core.ops.nf4_quantize import op
from lora_core.quant.blockwise import BLOCK_SIZES
from lora_core.quant.codebook import codebook
from lora_core.reference import nf4 as reference


def nf4_quantize(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return what the reference returns, bit for bit, with less than 1 MiB of scratch memory a thread.

    A weight that is not contiguous is copied first, in its own dtype.
    """
    # two codes are packed as one little-endian 16-bit word, and chunks must hold whole blocks
    if sys.byteorder != "little" or block_size not in BLOCK_SIZES:
        return reference.nf4_quantize(weight, block_size)
    flat = weight.detach().reshape(-1)
    n = flat.numel()
    packed = torch.empty((n + 1) // 2, 1, dtype=torch.uint8)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32)
    out = packed.view(-1).numpy()
    midpoints = codebook("nf4").midpoints.numpy()

    def work(first: int, last: int) -> None:
        scratch = torch.empty(CHUNK, dtype=torch.float32)
        codes, below = np.empty(CHUNK, np.uint8), np.empty(CHUNK, np.bool_)
        for start in range(first, last, CHUNK):
            count = min(CHUNK, last - start)
            blocks = -(-count // block_size)
            values = scratch[: blocks * block_size]
            values[:count].copy_(flat[start : start + count])
            values[count:] = 0
            rows = values.view(blocks, block_size)
            scale = absmax[start // block_size :][:blocks]
            torch.amax(rows.abs(), dim=1, out=scale)
            rows /= torch.where(scale == 0, 1, scale)[:, None]
            size = count + count % 2
            _encode(values.numpy()[:size], midpoints, codes[:size], below[:size])
            if count % 2:
                codes[count] = 0
            words = codes[:size].view(np.uint16)
            np.copyto(out[start // 2 :][: size // 2], words << 4 | words >> 8, casting="unsafe")

    run(work, n)
    return packed, absmax


def _encode(values: np.ndarray, midpoints: np.ndarray, codes: np.ndarray, below: np.ndarray) -> None:
    """Count into codes; a tie stays below, and NaN, which is above no midpoint and below none, gets 15."""
    codes.fill(len(midpoints))
    for midpoint in midpoints:
        np.less_equal(values, midpoint, out=below)
        np.subtract(codes, below.view(np.uint8), out=codes)


op.register_kernel("cpu")(nf4_quantize)
