"""Dot products of a few vectors with a few others, all at once, as LLVM's instructions.

A tile of R rows and C columns loads R + C vectors for R C products, where products one by one load two for each. Its
R C sums stay in registers: AVX-512 and Arm have 32 of them, other processors 16. A compiler vectorises such a loop half
as wide as AVX-512 allows, for fear of a lower clock, and gives up on so many sums elsewhere.
"""

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

_FEATURES = binding.get_host_cpu_features()
_WIDE = bool(_FEATURES.get("avx512f"))
# float32 in a register
LANES = 16 if _WIDE else 8 if _FEATURES.get("avx2") else 4
# of a tile at most
ROWS = 4
COLUMNS = 4 if _WIDE or _FEATURES.get("neon") else 2
SINGLE = ir.FloatType()
# a product and its addition may be rounded once
FUSED = ("contract",)


def tile(rows: int, columns: int = COLUMNS, lanes: int = LANES) -> Any:
    """Return compiled code for y = x W^T, some rows and columns of y at a time.

    It is called (x, row, w, begins, y, column, size): x is float32 [M, K], w float32 [columns, L], and row c of W lies
    at w[c, begins[c] : begins[c] + K], begins an array of intp; y is float32 [M, N]. Written are y[row : row + rows,
    column : column + size]. All arrays are contiguous, and no place in them is checked.

    Args:
        rows: of x.
        columns: of y, rows of w.
        lanes: numbers multiplied at once. Each sum is taken in an order that depends on them alone.
    """
    vector = ir.VectorType(SINGLE, lanes)

    def declare(_: Any, x: Any, row: Any, w: Any, begins: Any, y: Any, column: Any, size: Any) -> Any:
        if {array.layout for array in (x, w, begins, y)} != {"C"}:
            raise TypingError("a tile is one of contiguous arrays")

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            def array(at: int) -> tuple[Any, Any]:
                made = context.make_array(signature.args[at])(context, builder, arguments[at])
                return made.data, cgutils.unpack_tuple(builder, made.shape)[-1]

            (x_data, k), (w_data, stride), (starts, _), (y_data, n) = array(0), array(2), array(3), array(4)
            row, column, size = arguments[1], arguments[5], arguments[6]
            word = k.type

            def rows_of(first: Any, count: int) -> list[Any]:
                return [builder.add(first, ir.Constant(word, i)) for i in range(count)]

            xs = [builder.gep(x_data, [builder.mul(i, k)]) for i in rows_of(row, rows)]
            ws = []
            for i in range(columns):
                at = ir.Constant(word, i)
                begin = builder.add(builder.mul(at, stride), builder.load(builder.gep(starts, [at])))
                ws.append(builder.gep(w_data, [begin]))
            sums = [[cgutils.alloca_once_value(builder, ir.Constant(vector, [0.0] * lanes)) for _ in ws] for _ in xs]
            vectors = builder.sdiv(k, ir.Constant(word, lanes))
            with cgutils.for_range(builder, vectors) as loop:
                _accumulate(builder, xs, ws, sums, builder.mul(loop.index, ir.Constant(word, lanes)), vector)
            totals = [[cgutils.alloca_once_value(builder, _total(builder, s)) for s in line] for line in sums]
            whole = builder.mul(vectors, ir.Constant(word, lanes))
            with cgutils.for_range(builder, builder.sub(k, whole)) as loop:
                _accumulate(builder, xs, ws, totals, builder.add(whole, loop.index), SINGLE)
            for i, line in zip(rows_of(row, rows), totals, strict=True):
                start = builder.add(builder.mul(i, n), column)
                for c, total in enumerate(line):
                    at = ir.Constant(word, c)
                    with builder.if_then(builder.icmp_signed("<", at, size)):
                        builder.store(builder.load(total), builder.gep(y_data, [builder.add(start, at)]))
            return context.get_dummy_value()

        where = types.intp
        return types.void(x, where, w, begins, y, where, where), generate

    return intrinsic(declare)


def _accumulate(builder: Any, xs: list[Any], ws: list[Any], sums: list[list[Any]], at: Any, kind: Any) -> None:
    """Add x[at] * w[at] to each sum, of one number or of a vector."""

    def load(data: Any) -> Any:
        return builder.load(builder.bitcast(builder.gep(data, [at]), kind.as_pointer()), align=4)

    loaded = [load(w) for w in ws]
    for x, line in zip(xs, sums, strict=True):
        factor = load(x)
        for w, total in zip(loaded, line, strict=True):
            product = builder.fmul(factor, w, flags=FUSED)
            builder.store(builder.fadd(builder.load(total), product, flags=FUSED), total)


def _total(builder: Any, vector: Any) -> Any:
    """Return the sum of a vector's numbers, of one half and the other until one is left."""
    left = builder.load(vector)
    while left.type.count > 1:
        half = left.type.count // 2
        kind = ir.VectorType(ir.IntType(32), half)
        low, high = (
            builder.shuffle_vector(left, left, ir.Constant(kind, list(range(first, first + half))))
            for first in (0, half)
        )
        left = builder.fadd(low, high)
    return builder.extract_element(left, ir.Constant(ir.IntType(32), 0))
