"""y = x W^T for few rows of x, W decoded a row at a time into the cache nearest the processor.

A row of W is read once, at half a byte a weight, and multiplies four rows of x at a time: what a dense copy of W would
cost in memory traffic falls away. From some tens of rows on the copy and a library's product are faster.
"""

import numpy as np

from lora_core.cpu.compiled import nf4
from lora_core.cpu.compiled.jit import compiled, reordered

# rows of x at a time: each weight loaded serves so many products
ROWS = 4


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
        room: scratch [K + 2 block_size], of what the weights are rounded to: float32, or uint32 for bfloat16.
        y: float32 [M, N].
        block_size: weights of a scale, a multiple of 32.
        first: row of W.
        last: row of W, N at most.
    """
    rows, columns = x.shape
    weights = room.view(np.float32)
    for n in range(first, last):
        start = n * columns
        # a row may begin inside a block
        begin = start - start % block_size
        nf4.decode(codes, absmax, room, block_size, begin, start + columns)
        w = weights[start - begin : start - begin + columns]
        whole = rows - rows % ROWS
        for m in range(0, whole, ROWS):
            y[m, n], y[m + 1, n], y[m + 2, n], y[m + 3, n] = four_dots(x[m], x[m + 1], x[m + 2], x[m + 3], w)
        for m in range(whole, rows):
            y[m, n] = dot(x[m], w)


@reordered
def dot(x: np.ndarray, w: np.ndarray) -> np.float32:
    """Return the sum of the products of float32 vectors."""
    total = np.float32(0)
    for i in range(w.size):
        total += x[i] * w[i]
    return total


@reordered
def four_dots(x0: np.ndarray, x1: np.ndarray, x2: np.ndarray, x3: np.ndarray, w: np.ndarray) -> tuple[np.float32, ...]:
    """Return dot of each with w."""
    t0 = t1 = t2 = t3 = np.float32(0)
    for i in range(w.size):
        t0 += x0[i] * w[i]
        t1 += x1[i] * w[i]
        t2 += x2[i] * w[i]
        t3 += x3[i] * w[i]
    return t0, t1, t2, t3
