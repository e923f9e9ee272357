"""Dot products with rows of an NF4 weight whose values are picked in registers and never written.

A byte's high half is a value of an even place, its low half one of an odd place. So x comes in halves, its even and its
odd places, each picked value meets its own without being put in turn, and the products of both halves are summed.
Written as LLVM's instructions.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

from lora_core.cpu.compiled.nf4 import FORMS, sixteen
from lora_core.cpu.compiled.pick import LANES
from lora_core.cpu.compiled.tile import SINGLE, add_product, load, numbers, row_major, sum_of

VECTOR = ir.VectorType(SINGLE, LANES)
# of y, at a time
COLUMNS = 2
# K is a multiple of what so many bytes stand for
STEP = 2 * LANES


def picked(rows: int) -> Any:
    """Return compiled code for y = x W^T, so many rows and COLUMNS columns of y at a time.

    It is called (codes, absmax, shift, halves, row, kind, y, column, size): codes are uint8, 2^shift weights share a
    scale, halves are float32 [M, 2, K / 2], kind is an array of the dtype that stands for the weights' rounding in
    nf4.decode, y is float32 [M, N]. Written are y[row : row + rows, column : column + size]. K is a multiple of STEP.
    All arrays are contiguous, and no place in them is checked. Each sum is taken in one and the same order.
    """

    def declare(
        _: Any, codes: Any, absmax: Any, shift: Any, halves: Any, row: Any, kind: Any, y: Any, column: Any, size: Any
    ) -> Any:
        if {array.layout for array in (codes, absmax, halves, y)} != {"C"}:
            raise TypingError("values are picked for contiguous arrays")
        entries_of, _ = FORMS[kind.dtype]

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            packed, scales, x, out = (row_major(context, builder, signature, arguments, at) for at in (0, 1, 3, 6))
            shift, row, column, size = (arguments[at] for at in (2, 4, 7, 8))
            half = x.length
            number = numbers(half)
            _, taken = there(builder, number, size)
            # a row's bytes are as many as half its places
            begins = [builder.mul(builder.add(column, c), half) for c in taken]
            zero = ir.Constant(VECTOR, [0.0] * LANES)
            sums = [[[cgutils.alloca_once(builder, VECTOR) for _ in "01"] for _ in begins] for _ in range(rows)]
            for each in (s for line in sums for pair in line for s in pair):
                builder.store(zero, each)
            with cgutils.for_range(builder, builder.sdiv(half, number(LANES))) as loop:
                place = builder.mul(loop.index, number(LANES))
                values = []
                for begin in begins:
                    byte = builder.add(begin, place)
                    scale = builder.load(scales.at(builder.lshr(builder.shl(byte, number(1)), shift)))
                    values.append(sixteen(builder, entries_of, scale, packed.at(byte)))
                for m in range(rows):
                    line = builder.mul(builder.add(row, number(m)), number(2))
                    for side in range(2):
                        start = builder.mul(builder.add(line, number(side)), half)
                        factor = load(builder, x.at(builder.add(start, place)), VECTOR)
                        for c in range(COLUMNS):
                            add_product(builder, factor, builder.bitcast(values[c][side], VECTOR), sums[m][c][side])
            for m in range(rows):
                for c in range(COLUMNS):
                    both = builder.fadd(*(builder.load(s) for s in sums[m][c]))
                    at = builder.add(
                        builder.mul(builder.add(row, number(m)), out.length), builder.add(column, taken[c])
                    )
                    builder.store(sum_of(builder, both), out.at(at))
            return context.get_dummy_value()

        where = types.intp
        return types.void(codes, absmax, where, halves, where, kind, y, where, where), generate

    return intrinsic(declare)


def there(builder: Any, number: Any, size: Any) -> tuple[list[Any], list[Any]]:
    """Return for each of COLUMNS whether it is one of so many, and which to take: the last of them where it is not."""
    present = [builder.icmp_signed("<", number(c), size) for c in range(COLUMNS)]
    last = builder.sub(size, number(1))
    return present, [builder.select(is_there, number(c), last) for c, is_there in enumerate(present)]
