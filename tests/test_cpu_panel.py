"""Panels of products of small matrices, of every size and for every width of a processor's registers."""

import functools

import numpy as np
import pytest
from numpy.testing import assert_array_equal

numba = pytest.importorskip("numba")

from lora_core.cpu.compiled.emit import ROWS  # noqa: E402
from lora_core.cpu.compiled.panel import LANES, WIDTH, Matrix, multiply, panel  # noqa: E402
from lora_core.cpu.compiled.tile import COLUMNS  # noqa: E402

# vectors and lanes of AVX-512, AVX2, Arm and what has less, and of what is left of a width
PROCESSORS = {(COLUMNS, LANES), (1, LANES), (4, 16), (2, 8), (4, 4), (2, 4), (1, 4)}


@functools.cache
def compiled(vectors, lanes):
    """Return compiled code that calls a panel for this processor."""
    made = panel(vectors, lanes)
    return numba.njit(lambda a, i, r, s, b, j, q, c, k, t, n, d, add: made(a, i, r, s, b, j, q, c, k, t, n, d, add))


@numba.njit
def product(a, a_at, a_row, a_column, b, b_at, b_row, c, c_at, c_row, m, n, depth, add):
    multiply(Matrix(a, a_at, a_row, a_column), Matrix(b, b_at, b_row, 1), Matrix(c, c_at, c_row, 1), m, n, depth, add)


def whole(rng, shape):
    """Return whole numbers, whose sums are exact in any order."""
    return rng.integers(-9, 10, shape).astype(np.float32)


def check(run, rng, m, n, depth, transposed, add):
    """Compare with NumPy a product inside larger arrays, of which nothing else may be written."""
    a, b, c = whole(rng, (m + 5, depth + 3)), whole(rng, (depth + 2, n + 7)), whole(rng, (m + 4, n + 9))
    want = c.copy()
    part = want[2 : 2 + m, 3 : 3 + n]
    part[:] = add * part + a[1 : 1 + m, 2 : 2 + depth] @ b[1 : 1 + depth, 5 : 5 + n]
    lies = np.ascontiguousarray(a.T) if transposed else a
    rows, columns = (1, len(a)) if transposed else (a.shape[1], 1)
    place = rows + 2 * columns
    run(lies, place, rows, columns, b, b.shape[1] + 5, b.shape[1], c, 2 * c.shape[1] + 3, c.shape[1], m, n, depth, add)
    assert_array_equal(c, want)


@pytest.mark.parametrize(("vectors", "lanes"), sorted(PROCESSORS))
@pytest.mark.parametrize("rows", range(1, ROWS + 1))
@pytest.mark.parametrize("add", [False, True])
def test_panel_is_the_product_of_its_rows_and_columns_and_writes_no_other(rows, vectors, lanes, add):
    made, rng = compiled(vectors, lanes), np.random.default_rng(rows)

    def run(*given):
        # all but the columns, which a panel has as they are
        *most, columns, depth, add = given
        assert columns == vectors * lanes
        made(*most, depth, add)

    for depth in (0, 1, 2, 17):
        for transposed in (False, True):
            check(run, rng, rows, vectors * lanes, depth, transposed, add)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("m", [1, ROWS, ROWS + 1, 2 * ROWS + 3])
@pytest.mark.parametrize("n", [LANES, WIDTH, WIDTH + LANES, 2 * WIDTH + 3 * LANES])
def test_products_of_every_size_are_made_of_panels(m, n, transposed, add):
    check(product, np.random.default_rng(m + n), m, n, 33, transposed, add)


def test_a_product_of_nothing_writes_nothing():
    c = np.ones((4, WIDTH), np.float32)
    product(c, 0, WIDTH, 1, c, 0, WIDTH, c, 0, WIDTH, 0, WIDTH, 4, False)
    product(c, 0, WIDTH, 1, c, 0, WIDTH, c, 0, WIDTH, 4, 0, 4, False)
    assert (c == 1).all()


def test_panel_refuses_what_is_not_contiguous():
    array = np.zeros((4, 64), np.float32)
    with pytest.raises(numba.core.errors.TypingError, match="contiguous"):
        compiled(1, 4)(array[:, ::2], 0, 1, 1, array, 0, 1, array.copy(), 0, 1, 1, 1, False)
