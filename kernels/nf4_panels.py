"""An NF4 weight in panels that a GPU's cache can hold: of rows, which stay packed, and of columns, dequantised.

Rows are cut where a block of scales begins, so that a panel is a packed weight of its own. Columns cannot be cut out of
the codes; a kernel decodes them (nf4_columns.py).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lora_core.kernels.nf4_columns import TILE, launch_nf4_columns
from lora_core.kernels.nf4_tile import as_read
from lora_core.kernels.processors import processors
from lora_core.ops.packed import Packed

# what a GPU's cache holds; the fewer panels, the fewer products that end with multiprocessors idle
PANEL_BYTES = 2**26
# a matrix product's tiles as a library has them, and how many a multiprocessor should have of a panel's product
TILE_OF_Y, TILES_PER_PROCESSOR = 128, 2
# float32 numbers in 16 bytes
SCALES_AT_ONCE = 4


def size_of_panels(x: Tensor) -> int:
    """Return the bytes of a panel that x [M, terms] is multiplied by.

    A cache's, or more where the product of so few tokens would have no work for every multiprocessor.
    """
    tiles = -(-TILES_PER_PROCESSOR * processors(x.device) * TILE_OF_Y // max(len(x), 1))
    return max(PANEL_BYTES, tiles * TILE_OF_Y * x.shape[1] * x.itemsize)


def row_panels(w: Packed, dtype: torch.dtype, panel_bytes: int) -> Iterator[tuple[int, int, Packed]]:
    """Yield (first row, row behind the last, packed rows) of a weight's panels; each begins with a scale of its own.

    Args:
        w: the weight.
        dtype: that it will be dequantised to.
        panel_bytes: a panel is the most rows that fit in, but at least as many as can be cut off.
    """
    w = as_read(w)
    n, k = w.shape
    # a panel must begin with a block, and a second-level block where there are such
    unit = w.block_size * (w.nested_block_size if w.nested_absmax is not None else 1)
    least = _rows_in(unit, k)
    # better still: y is cut between a product's tiles, so that none is left in part and 16 bytes can be stored at once;
    # and 16 bytes of the second-level scales can be loaded at once
    whole = math.lcm(least, TILE_OF_Y)
    aligned = math.lcm(_rows_in(SCALES_AT_ONCE * unit, k), TILE_OF_Y)
    most = panel_bytes // max(k * dtype.itemsize, 1)
    step = next((rows for rows in (aligned, whole) if rows <= most), least)
    rows = max(most // step, 1) * step
    for first in range(0, n, rows):
        end = min(first + rows, n)
        start, stop = first * k, end * k
        block, last = start // w.block_size, -(-stop // w.block_size)
        nested = w.nested_absmax
        if nested is not None:
            nested = nested.reshape(-1)[block // w.nested_block_size : -(-last // w.nested_block_size)]
        yield (
            first,
            end,
            w._replace(
                codes=w.codes.view(-1)[start // 2 : (stop + 1) // 2],
                absmax=w.absmax.reshape(-1)[block:last],
                nested_absmax=nested,
                shape=(end - first, k),
            ),
        )


def _rows_in(unit: int, columns: int) -> int:
    """Return the fewest rows that are a whole number of units of elements."""
    return unit // math.gcd(columns, unit)


def column_panels(w: Packed, dtype: torch.dtype, panel_bytes: int) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (first column, column behind the last, W[:, first:end]) of a weight's panels, each shape [N, end - first].

    Args:
        w: the weight [N, K].
        dtype: float32, float16 or bfloat16.
        panel_bytes: a panel is the most columns that fit in, but at least as many as a tile of the kernel has.
    """
    w = as_read(w)
    n, k = w.shape
    step = TILE[1]
    columns = max(panel_bytes // max(n * dtype.itemsize, 1) // step, 1) * step
    for first in range(0, k, columns):
        end = min(first + columns, k)
        yield first, end, launch_nf4_columns(w, first, end - first, dtype)
