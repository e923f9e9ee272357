"""What the loops written as LLVM's instructions have in common: arrays, sums in registers, some rows at a time."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError

# of x at a time, at most
ROWS = 4
SINGLE = ir.FloatType()
FUSED = ("contract",)


def for_count(builder: Any, count: Any, emit: Callable[[int], None]) -> None:
    """Write what emit does for each number of rows up to ROWS, and run that for so many."""
    for rows in range(1, ROWS + 1):
        with builder.if_then(builder.icmp_signed("==", count, ir.Constant(count.type, rows))):
            emit(rows)


def zeroed(builder: Any, kind: Any) -> Any:
    """Return the pointer to a vector of zeros."""
    return cgutils.alloca_once_value(builder, ir.Constant(kind, [0.0] * kind.count))


def check_arrays(singles: Sequence[Any], others: Sequence[Any] = ()) -> None:
    """Raise TypingError unless these are contiguous, and the first of float32: vectors are read by address alone."""
    kinds = {array.dtype for array in singles}
    if kinds != {types.float32}:
        raise TypingError(f"vectors of {', '.join(map(str, kinds))}; want float32")
    if {array.layout for array in (*singles, *others)} != {"C"}:
        raise TypingError("vectors are read from contiguous arrays")


class RowMajor(NamedTuple):
    """A contiguous array in compiled code: its memory, and the length of its last dimension."""

    builder: Any
    data: Any
    length: Any

    def at(self, place: Any) -> Any:
        """Return the pointer to an element, counted from the first."""
        return self.builder.gep(self.data, [place])


def row_major(context: Any, builder: Any, signature: Any, arguments: Any, at: int) -> RowMajor:
    """Return the argument with this number."""
    array = context.make_array(signature.args[at])(context, builder, arguments[at])
    return RowMajor(builder, array.data, cgutils.unpack_tuple(builder, array.shape)[-1])


def numbers(like: Any) -> Callable[[int], Any]:
    """Return what makes constants of the type of `like`."""
    return lambda value: ir.Constant(like.type, value)


def load(builder: Any, data: Any, kind: Any) -> Any:
    """Return the number or the vector at a pointer to float32."""
    return builder.load(builder.bitcast(data, kind.as_pointer()), align=4)


def add_product(builder: Any, a: Any, b: Any, total: Any) -> None:
    """Add a b to what lies at `total`."""
    builder.store(multiply_add(builder, a, b, builder.load(total)), total)


def multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a b + c; product and sum may be rounded once together."""
    return builder.fadd(c, builder.fmul(a, b, flags=FUSED), flags=FUSED)


def in_every_lane(builder: Any, number: Any, kind: Any) -> Any:
    """Return the vector of this kind with a number in every lane."""
    word = ir.IntType(32)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), number, ir.Constant(word, 0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(word, kind.count), [0] * kind.count))


def sum_of(builder: Any, left: Any) -> Any:
    """Return the sum of a vector's numbers, of one half and the other until one is left."""
    while left.type.count > 1:
        half = left.type.count // 2
        kind = ir.VectorType(ir.IntType(32), half)
        low, high = (
            builder.shuffle_vector(left, left, ir.Constant(kind, list(range(first, first + half))))
            for first in (0, half)
        )
        left = builder.fadd(low, high)
    return builder.extract_element(left, ir.Constant(ir.IntType(32), 0))
