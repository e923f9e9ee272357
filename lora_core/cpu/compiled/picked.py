"""Dot products with rows of an NF4 weight whose values are picked and multiplied at once, without an array of them.

A byte's high half is a value of an even place, its low half one of an odd place. So x comes in halves, its even and its
odd places, each picked value meets its own without being put in turn, and the products of both halves are summed.
Written as LLVM's instructions.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from lora_core.cpu.compiled.emit import (
    SINGLE,
    add_product,
    check_arrays,
    for_count,
    load,
    numbers,
    row_major,
    sum_of,
    zeroed,
)
from lora_core.cpu.compiled.pick import LANES
from lora_core.cpu.compiled.sixteen import FORMS, sixteen

VECTOR = ir.VectorType(SINGLE, LANES)
# columns of y in a tile, at most
COLUMNS = 2
# the even places and the odd ones
SIDES = (0, 1)
# K is a multiple of what so many bytes stand for
STEP = 2 * LANES


def _picked(
    _: Any,
    codes: Any,
    absmax: Any,
    shift: Any,
    halves: Any,
    row: Any,
    count: Any,
    kind: Any,
    y: Any,
    column: Any,
    size: Any,
) -> Any:
    """Write some rows and columns of y = x W^T: y[row : row + count, column : column + size].

    Codes are uint8, 2^shift weights share a scale, halves are float32 [M, 2, K / 2], kind is an array of the dtype that
    stands for the weights' rounding in nf4.decode, y is float32 [M, N]; count is from 1 to ROWS, size from 1 to
    COLUMNS, K a multiple of STEP. All arrays are contiguous, and no place in them is checked. Each sum is taken in one
    order.
    """
    check_arrays((absmax, halves, y), (codes,))

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        packed, scales, x, out = (row_major(context, builder, signature, arguments, at) for at in (0, 1, 3, 7))
        shift, row, count, column, size = (arguments[at] for at in (2, 4, 5, 8, 9))
        half, number = x.length, numbers(x.length)
        _, taken = there(builder, number, size)
        begins = [builder.mul(builder.add(column, c), half) for c in taken]

        def emit(rows: int) -> None:
            lines = [builder.add(row, number(m)) for m in range(rows)]
            sums = [[[zeroed(builder, VECTOR) for _ in SIDES] for _ in begins] for _ in lines]
            with cgutils.for_range(builder, builder.sdiv(half, number(LANES))) as loop:
                place = builder.mul(loop.index, number(LANES))
                values = [values_at(builder, kind, packed, scales, shift, builder.add(b, place)) for b in begins]
                for line, of_line in zip(lines, sums, strict=True):
                    for side in SIDES:
                        factor = load(builder, x.at(builder.add(in_half(builder, line, side, half), place)), VECTOR)
                        for value, of_column in zip(values, of_line, strict=True):
                            add_product(builder, factor, value[side], of_column[side])
            for line, of_line in zip(lines, sums, strict=True):
                for c, of_column in zip(taken, of_line, strict=True):
                    both = builder.fadd(*map(builder.load, of_column))
                    at = builder.add(builder.mul(line, out.length), builder.add(column, c))
                    builder.store(sum_of(builder, both), out.at(at))

        for_count(builder, count, emit)
        return context.get_dummy_value()

    where = types.intp
    return types.void(codes, absmax, where, halves, where, where, kind, y, where, where), generate


picked: Any = intrinsic(_picked)


def values_at(builder: Any, kind: Any, packed: Any, scales: Any, shift: Any, byte: Any) -> list[Any]:
    """Return what the high and the low halves of 16 bytes stand for, whose scale is found by 2 byte >> shift."""
    scale = builder.load(scales.at(builder.lshr(builder.shl(byte, ir.Constant(byte.type, 1)), shift)))
    return [builder.bitcast(v, VECTOR) for v in sixteen(builder, FORMS[kind.dtype][0], scale, packed.at(byte))]


def in_half(builder: Any, line: Any, side: int, half: Any) -> Any:
    """Return where a row's even or odd places begin in an array [M, 2, half]."""
    return builder.mul(builder.add(builder.shl(line, ir.Constant(line.type, 1)), ir.Constant(line.type, side)), half)


def there(builder: Any, number: Any, size: Any) -> tuple[list[Any], list[Any]]:
    """Return for each of COLUMNS whether it is one of so many, and which to take: the last of them where it is not."""
    present = [builder.icmp_signed("<", number(c), size) for c in range(COLUMNS)]
    last = builder.sub(size, number(1))
    return present, [builder.select(is_there, number(c), last) for c, is_there in enumerate(present)]
