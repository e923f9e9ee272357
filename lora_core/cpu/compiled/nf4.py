"""NF4 decoded and encoded, and scales that are codes themselves decoded."""

from typing import Any

import numpy as np

from lora_core.cpu.compiled.jit import compiled
from lora_core.cpu.compiled.pick import LANES
from lora_core.cpu.compiled.share import share
from lora_core.cpu.compiled.sixteen import ROUNDS_TO_FLOAT16, VALUES, decode_sixteen
from lora_core.cpu.compiled.stream import settle, starts_a_line
from lora_core.cpu.scales import Scales
from lora_core.quant.codebook import codebook

__all__ = ["ROUNDS_TO_FLOAT16", "decode", "decode_scales", "dequantize", "dequantize_absmax", "encode"]

DYNAMIC = codebook("dynamic").levels.numpy()
MIDPOINTS = tuple(codebook("nf4").midpoints.numpy())
ZERO = np.int32(codebook("nf4").zero)
MAGNITUDE = np.uint32(0x7FFFFFFF)


@compiled
def decode(
    codes: np.ndarray,
    absmax: np.ndarray,
    values: np.ndarray,
    block_size: int,
    first: int,
    last: int,
    streamed: bool,
) -> None:
    """Decode elements first to last into values.

    Args:
        codes: uint8 [ceil(n / 2)], the high half first.
        absmax: float32 [ceil(n / block_size)].
        values: [last - first] or longer, of a dtype in FORMS.
        block_size: elements of a scale, a multiple of 32.
        first: a multiple of block_size.
        last: n at most.
        streamed: write past the caches, where values begin with a line of them.
    """
    streams = streamed and starts_a_line(values)
    whole = last - (last - first) % VALUES
    block, start = first // block_size, first
    while start < whole:
        scale, stop = absmax[block], min(start + block_size, whole)
        for i in range(start, stop, VALUES):
            decode_sixteen(scale, codes, i // 2, values, i - first, streams)
        block, start = block + 1, stop
    if streams:
        settle()
    if whole < last:
        short, room = np.zeros(LANES, np.uint8), np.empty(VALUES, values.dtype)
        short[: (last - whole + 1) // 2] = codes[whole // 2 : (last + 1) // 2]
        decode_sixteen(absmax[whole // block_size], short, 0, room, 0, False)
        values[whole - first : last - first] = room[: last - whole]


@compiled
def decode_scales(scales: Scales, first: int, last: int) -> None:
    """Make values first to last the scales, level * absmax2 + offset, each operation rounded.

    Threads may do so for overlapping ranges.

    Args:
        scales: left as they are where they are no codes.
        first: of the scales.
        last: of the scales, b at most.
    """
    if not scales.codes.size:
        return
    mean, block_size = scales.offset[0], scales.block_size
    for block in range(first // block_size, -(-last // block_size)):
        start, stop = max(first, block * block_size), min(last, (block + 1) * block_size)
        scale, coded, decoded = scales.absmax2[block], scales.codes[start:stop], scales.values[start:stop]
        for i in range(decoded.size):
            decoded[i] = DYNAMIC[coded[i]] * scale + mean


@compiled
def _dequantize(
    codes: np.ndarray,
    scales: Scales,
    values: np.ndarray,
    block_size: int,
    streamed: bool,
    first: int,
    last: int,
) -> None:
    decode_scales(scales, first // block_size, -(-last // block_size))
    decode(codes, scales.values, values[first:last], block_size, first, last, streamed)


@compiled
def dequantize(openmp: int, threads: int, counter: np.ndarray, step: int, count: int, *arguments: Any) -> None:
    """Decode ranges of elements and of their scales; a step is a multiple of block_size.

    Arguments:
        codes, block_size, streamed: as in decode.
        scales: of ceil(n / block_size) blocks.
        values: [n], of a dtype in sixteen.FORMS.
    """
    share(_dequantize, openmp, threads, counter, step, count, arguments)


@compiled
def dequantize_absmax(openmp: int, threads: int, counter: np.ndarray, step: int, count: int, *arguments: Any) -> None:
    """Decode ranges of scales."""
    share(decode_scales, openmp, threads, counter, step, count, arguments)


@compiled
def encode(values: np.ndarray, codes: np.ndarray, absmax: np.ndarray, block_size: int) -> None:
    """Encode values.

    Args:
        values: float32 [n].
        codes: uint8 [ceil(n / 2)].
        absmax: float32 [ceil(n / block_size)].
        block_size: elements of a scale, an even number.
    """
    bits, scales = values.view(np.uint32), absmax.view(np.uint32)
    # as wide as what is compared: bytes would be packed after every comparison
    chosen = np.empty(block_size, np.int32)
    for block in range(absmax.size):
        start = block * block_size
        words, weights = bits[start : start + block_size], values[start : start + block_size]
        # of magnitudes the larger has the larger bits, and NaN the largest
        largest = np.uint32(0)
        for i in range(words.size):
            largest = max(largest, np.uint32(words[i] & MAGNITUDE))
        scales[block] = largest
        divisor = absmax[block] if largest else np.float32(1)
        for i in range(words.size):
            # a tie stays below; NaN, which is above no midpoint and below none, gets 15
            quotient = weights[i] / divisor
            code = np.int32(15)
            for midpoint in MIDPOINTS:
                code -= np.int32(quotient <= midpoint)
            chosen[i] = code
        chosen[words.size :] = ZERO
        for i in range((words.size + 1) // 2):
            codes[start // 2 + i] = chosen[2 * i] << 4 | chosen[2 * i + 1]
