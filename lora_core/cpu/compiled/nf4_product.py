"""y = x W^T for few rows of x, and dx = dy W for few rows of dy: W is decoded as it is multiplied.

A row of W is read once, at half a byte a weight, and multiplies all rows of x: what a dense copy of W would cost in
memory traffic falls away. From some tens of rows on the copy and a library's product are faster.
"""

from typing import Any

import numpy as np

from lora_core.cpu.compiled import nf4, tile
from lora_core.cpu.compiled import picked as in_registers
from lora_core.cpu.compiled.emit import ROWS
from lora_core.cpu.compiled.jit import compiled
from lora_core.cpu.compiled.share import share
from lora_core.cpu.compiled.spread import spread
from lora_core.cpu.scales import Scales

COLUMNS, PICKED_COLUMNS, STEP = tile.COLUMNS, in_registers.COLUMNS, in_registers.STEP
# so many rows are faster with W decoded in registers, for each four of them anew: on two cores one row of [4096, 4096]
# took 0.6 ms instead of 1.5, eight took 1.9 instead of 3, sixteen took as long; with AVX2 four took 3 instead of 4
PICKED_ROWS = 2 * ROWS if tile.LANES == in_registers.LANES else ROWS
# places of half a row whose sums for four rows stay in the cache nearest the processor, of 32 KiB at least
SLAB = 512
multiply_tile, picked = tile.tile(), in_registers.picked


@compiled
def _multiply(
    codes: np.ndarray,
    scales: Scales,
    x: np.ndarray,
    kind: np.ndarray,
    y: np.ndarray,
    block_size: int,
    first: int,
    last: int,
) -> None:
    rows, columns = x.shape
    nf4.decode_scales(scales, first * columns // block_size, -(-last * columns // block_size))
    # zeros, as a tile multiplies rows that are not there, too
    room = np.zeros((COLUMNS, columns + block_size), kind.dtype)
    weights, begins = room.view(np.float32), np.zeros(COLUMNS, np.intp)
    for n in range(first, last, COLUMNS):
        size = min(COLUMNS, last - n)
        for c in range(size):
            start = (n + c) * columns
            # a row may begin inside a block
            begins[c] = start % block_size
            nf4.decode(codes, scales.values, room[c], block_size, start - begins[c], start + columns, False)
        for m in range(0, rows, ROWS):
            multiply_tile(x, m, min(ROWS, rows - m), weights, begins, y, n, size)


@compiled
def multiply(openmp: int, threads: int, counter: np.ndarray, step: int, count: int, *arguments: Any) -> None:
    """Write ranges of y's columns, rows of W, a few of which are decoded into a scratch of a thread's own.

    Arguments:
        codes: uint8 [ceil(N K / 2)], the high half first.
        scales: [ceil(N K / block_size)].
        x: float32 [M, K].
        kind: an array of what the weights are rounded to: float32, or uint32 for bfloat16.
        y: float32 [M, N].
        block_size: weights of a scale, a multiple of 32.
    """
    share(_multiply, openmp, threads, counter, step, count, arguments)


@compiled
def _multiply_picked(
    codes: np.ndarray,
    scales: Scales,
    halves: np.ndarray,
    kind: np.ndarray,
    y: np.ndarray,
    shift: int,
    first: int,
    last: int,
) -> None:
    rows, columns = len(halves), 2 * halves.shape[2]
    nf4.decode_scales(scales, first * columns >> shift, -(-last * columns >> shift))
    for n in range(first, last, PICKED_COLUMNS):
        size = min(PICKED_COLUMNS, last - n)
        for m in range(0, rows, ROWS):
            picked(codes, scales.values, shift, halves, m, min(ROWS, rows - m), kind, y, n, size)


@compiled
def multiply_picked(openmp: int, threads: int, counter: np.ndarray, step: int, count: int, *arguments: Any) -> None:
    """Write ranges of y's columns, rows of W, which are decoded anew for each four rows of x.

    Arguments:
        codes: uint8 [N K / 2], the high half first; K a multiple of STEP.
        scales: [ceil(N K / 2^shift)].
        halves: float32 [M, 2, K / 2], the even places of x, then the odd ones.
        kind: an array of what the weights are rounded to: float32, or uint32 for bfloat16.
        y: float32 [M, N].
        shift: logarithm of the weights of a scale, which are a multiple of 32.
    """
    share(_multiply_picked, openmp, threads, counter, step, count, arguments)


@compiled
def _multiply_back(
    codes: np.ndarray,
    scales: Scales,
    d_y: np.ndarray,
    kind: np.ndarray,
    sums: np.ndarray,
    part: int,
    shift: int,
    first: int,
    last: int,
) -> None:
    rows, half = len(d_y), sums.shape[3]
    nf4.decode_scales(scales, first * 2 * half >> shift, -(-last * 2 * half >> shift))
    for start in range(first, last, part):
        halves, stop = sums[start // part], min(start + part, last)
        for begin in range(0, half, SLAB):
            end = min(begin + SLAB, half)
            for m in range(0, rows, ROWS):
                for n in range(start, stop, PICKED_COLUMNS):
                    count, size = min(ROWS, rows - m), min(PICKED_COLUMNS, stop - n)
                    spread(codes, scales.values, shift, d_y, m, count, kind, halves, n, size, begin, end)


@compiled
def multiply_back(openmp: int, threads: int, counter: np.ndarray, step: int, count: int, *arguments: Any) -> None:
    """Add to sums what ranges of W's rows give of d_y W, each row decoded anew for each four rows of d_y.

    Arguments:
        codes: uint8 [N K / 2], the high half first; K a multiple of STEP.
        scales: [ceil(N K / 2^shift)].
        d_y: float32 [M, N].
        kind: an array of what the weights are rounded to: float32, or uint32 for bfloat16.
        sums: float32 [ceil(N / part), M, 2, K / 2], of each part for the even places of a row, then for the odd ones.
        part: rows of W that are summed together, of which a step is a multiple.
        shift: logarithm of the weights of a scale, which are a multiple of 32.
    """
    share(_multiply_back, openmp, threads, counter, step, count, arguments)
