"""Products of matrices that lie in a cache, as LLVM's instructions.

A library's product spends on packing, and on handing work out, what small ones take in all. Here some rows and columns
of C = A B, a panel, stay in registers, while numbers of A, each in every lane, multiply vectors of B. A may lie
transposed: its numbers are loaded one by one anyway.
"""

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from lora_core.cpu.compiled.emit import (
    ROWS,
    SINGLE,
    add_product,
    check_arrays,
    for_count,
    in_every_lane,
    load,
    numbers,
    row_major,
    zeroed,
)
from lora_core.cpu.compiled.jit import contracted
from lora_core.cpu.compiled.tile import COLUMNS, LANES

# columns of a panel, at most
WIDTH = COLUMNS * LANES


class Matrix(NamedTuple):
    """A matrix in an array of float32: the place of its first number, and how far apart rows and columns lie."""

    data: Any
    at: int
    row: int
    column: int


def panel(vectors: int, lanes: int = LANES) -> Any:
    """Return compiled code for some rows and vectors of C = A B, or C += A B.

    It is called (a, a_at, a_row, a_column, b, b_at, b_row, c, c_at, c_row, count, depth, add). a, b and c are
    contiguous arrays of float32, no place in which is checked. A[i, l] lies at a_at + i a_row + l a_column, B[l, j] at
    b_at + l b_row + j, C[i, j] at c_at + i c_row + j. A has count rows, from 1 to ROWS, and depth columns; add is a
    truth value.

    Args:
        vectors: columns of C, in lanes.
        lanes: numbers multiplied at once.
    """
    vector = ir.VectorType(SINGLE, lanes)

    def declare(
        _: Any,
        a: Any,
        a_at: Any,
        a_row: Any,
        a_column: Any,
        b: Any,
        b_at: Any,
        b_row: Any,
        c: Any,
        c_at: Any,
        c_row: Any,
        count: Any,
        depth: Any,
        add: Any,
    ) -> Any:
        check_arrays((a, b, c))

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            a, b, c = (row_major(context, builder, signature, arguments, at) for at in (0, 4, 7))
            a_at, a_row, a_column, b_at, b_row, c_at, c_row = (arguments[at] for at in (1, 2, 3, 5, 6, 8, 9))
            count, depth, add = arguments[10:]
            number = numbers(depth)
            columns = [number(lanes * v) for v in range(vectors)]

            def emit(rows: int) -> None:
                lines = [builder.add(a_at, builder.mul(number(i), a_row)) for i in range(rows)]
                starts = [builder.add(c_at, builder.mul(number(i), c_row)) for i in range(rows)]
                outs = [c.at(builder.add(start, j)) for start in starts for j in columns]
                sums = [zeroed(builder, vector) for _ in outs]
                with builder.if_then(add):
                    for total, out in zip(sums, outs, strict=True):
                        builder.store(load(builder, out, vector), total)
                with cgutils.for_range(builder, depth) as loop:
                    begin, place = (builder.mul(loop.index, apart) for apart in (b_row, a_column))
                    begin = builder.add(b_at, begin)
                    loaded = [load(builder, b.at(builder.add(begin, j)), vector) for j in columns]
                    for i, line in enumerate(lines):
                        factor = in_every_lane(builder, builder.load(a.at(builder.add(line, place))), vector)
                        for values, total in zip(loaded, sums[i * vectors : (i + 1) * vectors], strict=True):
                            add_product(builder, factor, values, total)
                for total, out in zip(sums, outs, strict=True):
                    builder.store(builder.load(total), builder.bitcast(out, vector.as_pointer()), align=4)

            for_count(builder, count, emit)
            return context.get_dummy_value()

        n = types.intp
        return types.void(a, n, n, n, b, n, n, c, n, n, n, n, types.boolean), generate

    return intrinsic(declare)


_wide, _narrow = panel(COLUMNS), panel(1)


@contracted
def by_rows(x: np.ndarray) -> Matrix:
    """Return a contiguous array as a matrix."""
    return Matrix(x, 0, x.shape[1], 1)


@contracted
def transposed(x: np.ndarray) -> Matrix:
    """Return the transpose of a contiguous array."""
    return Matrix(x, 0, 1, x.shape[1])


@contracted
def multiply(a: Matrix, b: Matrix, c: Matrix, m: int, n: int, depth: int, add: bool) -> None:
    """Write C = A B, or add A B to it: A of m rows and depth columns, C of n columns, a multiple of LANES.

    Columns of B and of C lie side by side.
    """
    wide = n // WIDTH * WIDTH
    for j in range(0, wide, WIDTH):
        for i in range(0, m, ROWS):
            _wide(*_places(a, b, c, i, j), min(ROWS, m - i), depth, add)
    for j in range(wide, n, LANES):
        for i in range(0, m, ROWS):
            _narrow(*_places(a, b, c, i, j), min(ROWS, m - i), depth, add)


@contracted
def _places(a: Matrix, b: Matrix, c: Matrix, i: int, j: int) -> Any:
    """Return what a panel takes of three matrices, from row i and column j of C on."""
    line, out = a.at + i * a.row, c.at + i * c.row + j
    return a.data, line, a.row, a.column, b.data, b.at + j, b.row, c.data, out, c.row
