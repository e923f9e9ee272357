"""Tiles of products, of every size and for every width of a processor's registers."""

import functools

import numpy as np
import pytest
from numpy.testing import assert_array_equal

numba = pytest.importorskip("numba")

from lora_core.cpu.compiled.emit import ROWS  # noqa: E402
from lora_core.cpu.compiled.tile import COLUMNS, LANES, tile  # noqa: E402

M, N = 7, 9
# of AVX-512, AVX2, Arm and what has less
PROCESSORS = {(COLUMNS, LANES), (4, 16), (2, 8), (4, 4), (2, 4)}


@functools.cache
def compiled(columns, lanes):
    """Return compiled code that calls a tile for this processor."""
    made = tile(columns, lanes)
    return numba.njit(lambda x, row, count, w, begins, y, column, size: made(x, row, count, w, begins, y, column, size))


@pytest.mark.parametrize(("columns", "lanes"), sorted(PROCESSORS))
@pytest.mark.parametrize("rows", range(1, ROWS + 1))
def test_tile_is_the_product_of_its_rows_and_columns_and_writes_no_other(rows, columns, lanes):
    """In whole numbers, whose sums are exact in any order."""
    run, rng = compiled(columns, lanes), np.random.default_rng(rows)
    for k in (1, 2, lanes - 1, lanes, lanes + 1, 5 * lanes + 3):
        for size in range(1, columns + 1):
            x = rng.integers(-9, 10, (M, k)).astype(np.float32)
            w = rng.integers(-9, 10, (columns, k + 40)).astype(np.float32)
            begins = rng.integers(0, 40, columns)
            row, column = int(rng.integers(0, M - rows + 1)), int(rng.integers(0, N - size + 1))
            y = np.full((M, N), np.nan, np.float32)
            run(x, row, rows, w, begins, y, column, size)
            want = np.full((M, N), np.nan, np.float32)
            for c in range(size):
                want[row : row + rows, column + c] = x[row : row + rows] @ w[c, begins[c] : begins[c] + k]
            assert_array_equal(y, want)


@pytest.mark.parametrize(("columns", "lanes"), sorted(PROCESSORS))
def test_tile_sums_in_one_order_whatever_its_size(columns, lanes):
    """So that a row's result does not depend on which others are in its batch."""
    rng, k = np.random.default_rng(0), 1003
    x, w = (rng.standard_normal((rows, k)).astype(np.float32) for rows in (ROWS, columns))
    begins, found = np.zeros(columns, np.int64), []
    for rows in range(1, ROWS + 1):
        y = np.zeros((ROWS, columns), np.float32)
        compiled(columns, lanes)(x, 0, rows, w, begins, y, 0, columns)
        found.append(y[0])
    assert len({row.tobytes() for row in found}) == 1


def test_tile_refuses_what_is_not_contiguous():
    array = np.zeros((4, 64), np.float32)
    with pytest.raises(numba.core.errors.TypingError, match="contiguous"):
        compiled(COLUMNS, LANES)(array[:, ::2], 0, 1, array, np.zeros(COLUMNS, np.int64), array.copy(), 0, 1)


def test_tile_refuses_numbers_of_another_size():
    array = np.zeros((4, 64), np.float32)
    with pytest.raises(numba.core.errors.TypingError, match="float64.*; want float32"):
        compiled(COLUMNS, LANES)(array, 0, 1, array, np.zeros(COLUMNS, np.int64), array.astype(np.float64), 0, 1)
