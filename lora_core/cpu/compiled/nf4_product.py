"""y = x W^T for few rows of x, W decoded a few rows at a time into the cache nearest the processor.

A row of W is read once, at half a byte a weight, and multiplies all rows of x: what a dense copy of W would cost in
memory traffic falls away. From some tens of rows on the copy and a library's product are faster.
"""

import numpy as np

from lora_core.cpu.compiled import nf4
from lora_core.cpu.compiled.jit import compiled
from lora_core.cpu.compiled.tile import COLUMNS, ROWS, tile

one, two, three, four = (tile(rows + 1) for rows in range(ROWS))


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
    whole = rows - rows % ROWS
    for n in range(first, last, COLUMNS):
        size = min(COLUMNS, last - n)
        for c in range(size):
            start = (n + c) * columns
            # a row may begin inside a block
            begins[c] = start % block_size
            nf4.decode(codes, absmax, room[c], block_size, start - begins[c], start + columns)
        for m in range(0, whole, ROWS):
            four(x, m, weights, begins, y, n, size)
        if rows - whole == 1:
            one(x, whole, weights, begins, y, n, size)
        elif rows - whole == 2:
            two(x, whole, weights, begins, y, n, size)
        elif rows - whole == 3:
            three(x, whole, weights, begins, y, n, size)
