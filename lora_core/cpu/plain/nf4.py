"""NF4 decoded and encoded a chunk at a time.

Each byte looks up a pair of levels, which the scales multiply; a code is 15 less the midpoints not below its quotient.
"""

import functools

import numpy as np
import torch

from lora_core.cpu.chunks import CHUNK, GRAIN
from lora_core.cpu.scales import Scales
from lora_core.quant.codebook import codebook


def decode(
    codes: np.ndarray,
    absmax: np.ndarray,
    values: np.ndarray,
    block_size: int,
    first: int,
    last: int,
    streamed: bool,
) -> None:
    """Decode elements first to last into values, with 4 bytes an element, at most 1 MiB, of scratch.

    Args:
        codes: uint8 [ceil(n / 2)], the high half first.
        absmax: float32 [ceil(n / block_size)].
        values: float32 [last - first].
        block_size: elements of a scale, a multiple of 32 that divides a grain.
        first: a multiple of a chunk.
        last: n at most.
        streamed: of compiled loops' own, and nothing here.
    """
    pairs, scales, out = _pairs(), torch.from_numpy(absmax)[:, None], torch.from_numpy(values)
    index = np.empty((min(CHUNK, last - first) + 1) // 2, np.intp)
    for start in range(first, last, CHUNK):
        count = min(CHUNK, last - start)
        pairs_whole, whole = count // 2, count - count % block_size
        part, at = out[start - first :][:count], start // block_size
        np.copyto(index[: (count + 1) // 2], codes[start // 2 :][: (count + 1) // 2])
        # an index of one byte is never out of range: the mode only spares NumPy a buffer
        np.take(pairs, index[:pairs_whole], out=part.numpy()[: 2 * pairs_whole].view(np.int64), mode="wrap")
        if count % 2:
            part[-1] = float(pairs[index[pairs_whole : pairs_whole + 1]].view(np.float32)[0])
        if whole:
            rows = part[:whole].view(-1, block_size).split(GRAIN // block_size)
            torch._foreach_mul_(rows, scales[at:][: whole // block_size].split(GRAIN // block_size))
        if count > whole:
            part[whole:] *= scales[at + whole // block_size]


def decode_scales(scales: Scales, first: int, last: int) -> None:
    """Make values first to last the scales, level * absmax2 + offset, each operation rounded.

    Threads may do so for overlapping ranges.

    Args:
        scales: left as they are where they are no codes.
        first: of the scales.
        last: of the scales, b at most.
    """
    if scales.codes.size:
        levels = codebook("dynamic").levels.numpy()[scales.codes[first:last]]
        blocks = np.arange(first, last) // scales.block_size
        scales.values[first:last] = levels * scales.absmax2[blocks] + scales.offset


def encode(values: np.ndarray, codes: np.ndarray, absmax: np.ndarray, block_size: int) -> None:
    """Encode at most a chunk of values, with 6 bytes an element of scratch.

    Args:
        values: float32 [n]; what it holds afterwards is of no use.
        codes: uint8 [ceil(n / 2)].
        absmax: float32 [ceil(n / block_size)].
        block_size: elements of a scale, a multiple of 32 that divides a grain.
    """
    n, blocks = values.size, absmax.size
    if n % block_size:
        # a short last block is filled up with zeros, which no maximum of magnitudes sees
        values = np.concatenate([values, np.zeros(blocks * block_size - n, np.float32)])
    rows = values.reshape(blocks, block_size)
    magnitudes, scales = torch.from_numpy(np.abs(rows)), torch.from_numpy(absmax)
    for part, largest in zip(*(t.split(GRAIN // block_size) for t in (magnitudes, scales)), strict=True):
        torch.amax(part, dim=1, out=largest)
    divisor = absmax[:, None]
    with np.errstate(invalid="ignore"):
        np.divide(rows, np.where(divisor == 0, np.float32(1), divisor), out=rows)
    size = n + n % 2
    chosen, below = np.full(size, 15, np.uint8), np.empty(size, np.bool_)
    for midpoint in codebook("nf4").midpoints.numpy():
        # a tie stays below; NaN, which is above no midpoint and below none, gets 15
        np.less_equal(values[:size], midpoint, out=below)
        np.subtract(chosen, below.view(np.uint8), out=chosen)
    chosen[n:] = codebook("nf4").zero
    words = chosen.view("<u2")
    np.copyto(codes, words << 4 | words >> 8, casting="unsafe")


@functools.cache
def _pairs() -> np.ndarray:
    """Return the two float32 levels of every byte, the high half's first, as int64 of shape [256]."""
    byte = torch.arange(256, dtype=torch.uint8, device="cpu")
    levels = codebook("nf4").decode(torch.stack([byte >> 4, byte & 15], dim=1))
    return levels.numpy().view(np.int64).reshape(-1)
