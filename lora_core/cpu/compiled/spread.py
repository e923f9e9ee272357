"""Rows of an NF4 weight, times a number each and summed: the product with the weight itself instead of its transpose.

Values are picked in registers and never written, as in picked.py, and the sums are kept in halves likewise: those of
even places, and those of odd ones. Written as LLVM's instructions.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

from lora_core.cpu.compiled.nf4 import FORMS, in_every_lane, sixteen
from lora_core.cpu.compiled.pick import LANES
from lora_core.cpu.compiled.picked import VECTOR, there
from lora_core.cpu.compiled.tile import FUSED, load, numbers, row_major


def spread(rows: int) -> Any:
    """Return compiled code that adds COLUMNS rows of W, times numbers, to so many rows of sums.

    It is called (codes, absmax, shift, d_y, row, kind, halves, column, size, first, last): codes are uint8, 2^shift
    weights share a scale, d_y is float32 [M, N], kind is an array of the dtype that stands for the weights' rounding in
    nf4.decode, halves are float32 [M, 2, K / 2]. Added to halves[row + i, :, first : last] are the places of rows
    column to column + size of W, each times d_y[row + i, its row]; last - first is a multiple of LANES. All arrays are
    contiguous, and no place in them is checked.
    """

    def declare(
        _: Any,
        codes: Any,
        absmax: Any,
        shift: Any,
        d_y: Any,
        row: Any,
        kind: Any,
        halves: Any,
        column: Any,
        size: Any,
        first: Any,
        last: Any,
    ) -> Any:
        if {array.layout for array in (codes, absmax, d_y, halves)} != {"C"}:
            raise TypingError("values are picked for contiguous arrays")
        entries_of, _ = FORMS[kind.dtype]

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            packed, scales, grads, out = (row_major(context, builder, signature, arguments, at) for at in (0, 1, 3, 6))
            shift, row, column, size, first, last = (arguments[at] for at in (2, 4, 7, 8, 9, 10))
            half = out.length
            number = numbers(half)
            lines = [builder.add(row, number(i)) for i in range(rows)]
            present, taken = there(builder, number, size)
            begins = [builder.mul(builder.add(column, c), half) for c in taken]
            grad_lines = [builder.add(builder.mul(i, grads.length), column) for i in lines]
            factors = [
                [in_every_lane(builder, builder.load(grads.at(builder.add(line, c)))) for c in taken]
                for line in grad_lines
            ]
            zero = ir.Constant(VECTOR, [0.0] * LANES)
            steps = builder.sdiv(builder.sub(last, first), number(LANES))
            with cgutils.for_range(builder, steps) as loop:
                place = builder.add(first, builder.mul(loop.index, number(LANES)))
                values = []
                for begin, is_there in zip(begins, present, strict=True):
                    byte = builder.add(begin, place)
                    scale = builder.load(scales.at(builder.lshr(builder.shl(byte, number(1)), shift)))
                    both = sixteen(builder, entries_of, scale, packed.at(byte))
                    values.append([builder.select(is_there, builder.bitcast(v, VECTOR), zero) for v in both])
                for i, line in zip(lines, factors, strict=True):
                    for side in range(2):
                        start = builder.mul(builder.add(builder.mul(i, number(2)), number(side)), half)
                        at = out.at(builder.add(start, place))
                        total = load(builder, at, VECTOR)
                        for factor, value in zip(line, values, strict=True):
                            product = builder.fmul(factor, value[side], flags=FUSED)
                            total = builder.fadd(total, product, flags=FUSED)
                        builder.store(total, builder.bitcast(at, VECTOR.as_pointer()), align=4)
            return context.get_dummy_value()

        where = types.intp
        return types.void(codes, absmax, where, d_y, where, kind, halves, where, where, where, where), generate

    return intrinsic(declare)
