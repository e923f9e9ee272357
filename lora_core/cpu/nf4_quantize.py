"""lora_core::nf4_quantize on the CPU: the code is 15 less the midpoints not below the quotient, counted in NumPy."""

import sys

import numpy as np
import torch
from torch import Tensor

from lora_core.cpu.chunks import CHUNK, GRAIN, run
from lora_core.ops.nf4_quantize import op
from lora_core.quant.blockwise import BLOCK_SIZES
from lora_core.quant.codebook import codebook
from lora_core.reference import nf4 as reference


def nf4_quantize(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return what the reference returns, bit for bit, with 10 bytes an element, at most 2.5 MiB, of scratch a thread.

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
        room = min(CHUNK, -(-(last - first) // block_size) * block_size)
        values, magnitudes = (torch.empty(room, dtype=torch.float32) for _ in range(2))
        codes, below = np.empty(room, np.uint8), np.empty(room, np.bool_)
        for start in range(first, last, CHUNK):
            count = min(CHUNK, last - start)
            blocks = -(-count // block_size)
            torch._foreach_copy_(values[:count].split(GRAIN), flat[start : start + count].split(GRAIN))
            # a short last block is filled up with zeros, which no maximum of magnitudes sees
            values[count : blocks * block_size] = 0
            rows = values.numpy()[: blocks * block_size].reshape(blocks, block_size)
            np.abs(rows, out=magnitudes.numpy()[: rows.size].reshape(rows.shape))
            scale = absmax[start // block_size :][:blocks]
            wide = magnitudes[: rows.size].view(rows.shape)
            for part, largest in zip(wide.split(GRAIN // block_size), scale.split(GRAIN // block_size), strict=True):
                torch.amax(part, dim=1, out=largest)
            divisor = scale.numpy()[:, None]
            np.divide(rows, np.where(divisor == 0, np.float32(1), divisor), out=rows)
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
