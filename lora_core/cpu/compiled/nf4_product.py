"""y = x W^T for few rows of x, and dx = dy W for few rows of dy: W is decoded as it is multiplied.

A row of W is read once, at half a byte a weight, and multiplies all rows of x: what a dense copy of W would cost in
memory traffic falls away. From some tens of rows on the copy and a library's product are faster.
"""

import numpy as np

from lora_core.cpu.compiled import nf4, tile
from lora_core.cpu.compiled import picked as in_registers
from lora_core.cpu.compiled.emit import ROWS
from lora_core.cpu.compiled.jit import compiled
from lora_core.cpu.compiled.spread import spread

COLUMNS, PICKED_COLUMNS, STEP = tile.COLUMNS, in_registers.COLUMNS, in_registers.STEP
# so many rows are faster with W decoded in registers, for each four of them anew: on two cores one row of [4096, 4096]
# took 0.6 ms instead of 1.5, eight took 1.9 instead of 3, sixteen took as long; with AVX2 four took 3 instead of 4
PICKED_ROWS = 2 * ROWS if tile.LANES == in_registers.LANES else ROWS
# places of half a row whose sums for four rows stay in the cache nearest the processor, of 32 KiB at least
SLAB = 512
multiply_tile, picked = tile.tile(), in_registers.picked


@compiled
def multiply(
    codes: np.ndarray,
    absmax: np.ndarray,
    x: np.ndarray,
    room: np.ndarray,
    y: np.ndarray,
    block_size: int,
    first: int,
    last: int,
) -> None:
    """Write columns first to last of y, rows of W.

    Args:
        codes: uint8 [ceil(N K / 2)], the high half first.
        absmax: float32 [ceil(N K / block_size)].
        x: float32 [M, K].
        room: scratch [COLUMNS, K + block_size], of what the weights are rounded to: float32, or uint32 for bfloat16.
        y: float32 [M, N].
        block_size: weights of a scale, a multiple of 32.
        first: row of W.
        last: row of W, N at most.
    """
    rows, columns = x.shape
    weights, begins = room.view(np.float32), np.zeros(COLUMNS, np.intp)
    for n in range(first, last, COLUMNS):
        size = min(COLUMNS, last - n)
        for c in range(size):
            start = (n + c) * columns
            # a row may begin inside a block
            begins[c] = start % block_size
            nf4.decode(codes, absmax, room[c], block_size, start - begins[c], start + columns, False)
        for m in range(0, rows, ROWS):
            multiply_tile(x, m, min(ROWS, rows - m), weights, begins, y, n, size)


@compiled
def multiply_picked(
    codes: np.ndarray,
    absmax: np.ndarray,
    halves: np.ndarray,
    kind: np.ndarray,
    y: np.ndarray,
    shift: int,
    first: int,
    last: int,
) -> None:
    """Write columns first to last of y, rows of W, which are decoded anew for each four rows of x.

    Args:
        codes: uint8 [N K / 2], the high half first; K a multiple of STEP.
        absmax: float32 [ceil(N K / 2^shift)].
        halves: float32 [M, 2, K / 2], the even places of x, then the odd ones.
        kind: an array of what the weights are rounded to: float32, or uint32 for bfloat16.
        y: float32 [M, N].
        shift: logarithm of the weights of a scale, which are a multiple of 32.
        first: row of W.
        last: row of W, N at most.
    """
    rows = len(halves)
    for n in range(first, last, PICKED_COLUMNS):
        size = min(PICKED_COLUMNS, last - n)
        for m in range(0, rows, ROWS):
            picked(codes, absmax, shift, halves, m, min(ROWS, rows - m), kind, y, n, size)


@compiled
def multiply_back(
    codes: np.ndarray,
    absmax: np.ndarray,
    d_y: np.ndarray,
    kind: np.ndarray,
    halves: np.ndarray,
    shift: int,
    first: int,
    last: int,
) -> None:
    """Add to halves what rows first to last of W give of d_y W, each decoded anew for each four rows of d_y.

    Args:
        codes: uint8 [N K / 2], the high half first; K a multiple of STEP.
        absmax: float32 [ceil(N K / 2^shift)].
        d_y: float32 [M, N].
        kind: an array of what the weights are rounded to: float32, or uint32 for bfloat16.
        halves: float32 [M, 2, K / 2], sums for the even places of a row, then for the odd ones.
        shift: logarithm of the weights of a scale, which are a multiple of 32.
        first: row of W.
        last: row of W, N at most.
    """
    rows, half = len(d_y), halves.shape[2]
    for begin in range(0, half, SLAB):
        end = min(begin + SLAB, half)
        for m in range(0, rows, ROWS):
            for n in range(first, last, PICKED_COLUMNS):
                count, size = min(ROWS, rows - m), min(PICKED_COLUMNS, last - n)
                spread(codes, absmax, shift, d_y, m, count, kind, halves, n, size, begin, end)
