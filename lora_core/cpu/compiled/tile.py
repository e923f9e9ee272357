"""Dot products of a few vectors with a few others, all at once, as LLVM's instructions.

A tile of R rows and C columns loads R + C vectors for R C products, where products one by one load two for each. Its
R C sums stay in registers: AVX-512 and Arm have 32 of them, other processors 16. A compiler vectorises such a loop half
as wide as AVX-512 allows, for fear of a lower clock, and gives up on so many sums elsewhere.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

_FEATURES = binding.get_host_cpu_features()
_WIDE = bool(_FEATURES.get("avx512f"))
# float32 in a register
LANES = 16 if _WIDE else 8 if _FEATURES.get("avx2") else 4
# of y, at a time, at most
ROWS = 4
COLUMNS = 4 if _WIDE or _FEATURES.get("neon") else 2
SINGLE = ir.FloatType()
FUSED = ("contract",)


def tile(columns: int = COLUMNS, lanes: int = LANES) -> Any:
    """Return compiled code for y = x W^T, some rows and columns of y at a time.

    It is called (x, row, count, w, begins, y, column, size): x is float32 [M, K], w float32 [columns, L], and row c of
    W lies at w[c, begins[c] : begins[c] + K], begins an array of intp; y is float32 [M, N]. Written are y[row : row +
    count, column : column + size], count and size from 1 to ROWS and to columns. All arrays are contiguous, and no
    place in them is checked.

    Args:
        columns: of y, rows of w.
        lanes: numbers multiplied at once. Each sum is taken in an order that depends on them alone.
    """
    vector = ir.VectorType(SINGLE, lanes)

    def declare(_: Any, x: Any, row: Any, count: Any, w: Any, begins: Any, y: Any, column: Any, size: Any) -> Any:
        if {array.layout for array in (x, w, begins, y)} != {"C"}:
            raise TypingError("a tile is one of contiguous arrays")

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, w, starts, y = (row_major(context, builder, signature, arguments, at) for at in (0, 3, 4, 5))
            row, count, column, size = (arguments[at] for at in (1, 2, 6, 7))
            k = x.length
            number = numbers(k)
            begins = [builder.load(starts.at(number(c))) for c in range(columns)]
            ws = [w.at(builder.add(builder.mul(number(c), w.length), begin)) for c, begin in enumerate(begins)]
            vectors = builder.sdiv(k, number(lanes))
            whole = builder.mul(vectors, number(lanes))

            def emit(rows: int) -> None:
                lines = [builder.add(row, number(i)) for i in range(rows)]
                xs = [x.at(builder.mul(i, k)) for i in lines]
                sums = [[zeroed(builder, vector) for _ in ws] for _ in xs]
                with cgutils.for_range(builder, vectors) as loop:
                    _accumulate(builder, xs, ws, sums, builder.mul(loop.index, number(lanes)), vector)
                totals = [[zeroed(builder, SINGLE) for _ in ws] for _ in xs]
                for line, into in zip(sums, totals, strict=True):
                    for s, total in zip(line, into, strict=True):
                        builder.store(sum_of(builder, builder.load(s)), total)
                with cgutils.for_range(builder, builder.sub(k, whole)) as loop:
                    _accumulate(builder, xs, ws, totals, builder.add(whole, loop.index), SINGLE)
                for i, line in zip(lines, totals, strict=True):
                    start = builder.add(builder.mul(i, y.length), column)
                    for c, total in enumerate(line):
                        with builder.if_then(builder.icmp_signed("<", number(c), size)):
                            builder.store(builder.load(total), y.at(builder.add(start, number(c))))

            for_count(builder, count, emit)
            return context.get_dummy_value()

        where = types.intp
        return types.void(x, where, where, w, begins, y, where, where), generate

    return intrinsic(declare)


def for_count(builder: Any, count: Any, emit: Callable[[int], None]) -> None:
    """Write what emit does for each number of rows up to ROWS, and run that for so many."""
    for rows in range(1, ROWS + 1):
        with builder.if_then(builder.icmp_signed("==", count, ir.Constant(count.type, rows))):
            emit(rows)


def zeroed(builder: Any, kind: Any) -> Any:
    """Return the pointer to a sum that is 0, a number or a vector of them."""
    at = cgutils.alloca_once(builder, kind)
    builder.store(ir.Constant(kind, [0.0] * kind.count if isinstance(kind, ir.VectorType) else 0.0), at)
    return at


def _accumulate(builder: Any, xs: list[Any], ws: list[Any], sums: list[list[Any]], at: Any, kind: Any) -> None:
    """Add x[at] * w[at] to each sum, of one number or of a vector."""
    loaded = [load(builder, builder.gep(w, [at]), kind) for w in ws]
    for x, line in zip(xs, sums, strict=True):
        factor = load(builder, builder.gep(x, [at]), kind)
        for w, total in zip(loaded, line, strict=True):
            add_product(builder, factor, w, total)


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
    """Add a b to what lies at `total`; product and sum may be rounded once together."""
    product = builder.fmul(a, b, flags=FUSED)
    builder.store(builder.fadd(builder.load(total), product, flags=FUSED), total)


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
