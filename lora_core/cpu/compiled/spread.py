"""Rows of an NF4 weight, times a number each and summed: the product with the weight itself instead of its transpose.

Values are multiplied as they are picked, as in picked.py, and the sums are kept in halves likewise: those of even
places, and those of odd ones. Written as LLVM's instructions.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from lora_core.cpu.compiled.emit import (
    SINGLE,
    check_arrays,
    for_count,
    in_every_lane,
    load,
    multiply_add,
    numbers,
    row_major,
)
from lora_core.cpu.compiled.pick import LANES
from lora_core.cpu.compiled.picked import SIDES, VECTOR, in_half, there, values_at


def _spread(
    _: Any,
    codes: Any,
    absmax: Any,
    shift: Any,
    d_y: Any,
    row: Any,
    count: Any,
    kind: Any,
    halves: Any,
    column: Any,
    size: Any,
    first: Any,
    last: Any,
) -> Any:
    """Add rows column to column + size of W, times numbers, to halves[row : row + count, :, first : last].

    Codes are uint8, 2^shift weights share a scale, row n of W is multiplied by d_y[m, n], float32 [M, N], for row m of
    halves, float32 [M, 2, K / 2]; kind is an array of the dtype that stands for the weights' rounding in nf4.decode;
    count is from 1 to ROWS, size from 1 to COLUMNS, last - first a multiple of LANES. All arrays are contiguous, and no
    place in them is checked.
    """
    check_arrays((absmax, d_y, halves), (codes,))

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        packed, scales, grads, out = (row_major(context, builder, signature, arguments, at) for at in (0, 1, 3, 7))
        shift, row, count, column, size, first, last = (arguments[at] for at in (2, 4, 5, 8, 9, 10, 11))
        half, number = out.length, numbers(out.length)
        present, taken = there(builder, number, size)
        begins = [builder.mul(builder.add(column, c), half) for c in taken]
        nothing, none = ir.Constant(SINGLE, 0.0), ir.Constant(VECTOR, [0.0] * LANES)

        def emit(rows: int) -> None:
            lines = [builder.add(row, number(m)) for m in range(rows)]
            factors = []
            for line in lines:
                start = builder.add(builder.mul(line, grads.length), column)
                given = [builder.load(grads.at(builder.add(start, c))) for c in taken]
                # of a row that is not there both are 0, as either may be infinite
                kept = [builder.select(is_there, g, nothing) for is_there, g in zip(present, given, strict=True)]
                factors.append([in_every_lane(builder, g, VECTOR) for g in kept])
            steps = builder.sdiv(builder.sub(last, first), number(LANES))
            with cgutils.for_range(builder, steps) as loop:
                place = builder.add(first, builder.mul(loop.index, number(LANES)))
                values = []
                for begin, is_there in zip(begins, present, strict=True):
                    both = values_at(builder, kind, packed, scales, shift, builder.add(begin, place))
                    values.append([builder.select(is_there, v, none) for v in both])
                for line, of_line in zip(lines, factors, strict=True):
                    for side in SIDES:
                        at = out.at(builder.add(in_half(builder, line, side, half), place))
                        total = load(builder, at, VECTOR)
                        for factor, value in zip(of_line, values, strict=True):
                            total = multiply_add(builder, factor, value[side], total)
                        builder.store(total, builder.bitcast(at, VECTOR.as_pointer()), align=4)

        for_count(builder, count, emit)
        return context.get_dummy_value()

    where = types.intp
    return types.void(codes, absmax, where, d_y, where, where, kind, halves, where, where, where, where), generate


spread: Any = intrinsic(_spread)
