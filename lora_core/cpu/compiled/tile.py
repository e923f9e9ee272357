"""Dot products of a few vectors with a few others, all at once, as LLVM's instructions.

A tile of R rows and C columns loads R + C vectors for R C products, where products one by one load two for each. Its
R C sums stay in registers: AVX-512 and Arm have 32 of them, other processors 16. A compiler vectorises such a loop half
as wide as AVX-512 allows, for fear of a lower clock, and gives up on so many sums elsewhere.
"""

from typing import Any

from llvmlite import binding, ir
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

_FEATURES = binding.get_host_cpu_features()
_WIDE = bool(_FEATURES.get("avx512f"))
# float32 in a register
LANES = 16 if _WIDE else 8 if _FEATURES.get("avx2") else 4
# columns of y in a tile, at most
COLUMNS = 4 if _WIDE or _FEATURES.get("neon") else 2


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
        check_arrays((x, w, y), (begins,))

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
                totals = [
                    [cgutils.alloca_once_value(builder, sum_of(builder, builder.load(s))) for s in line]
                    for line in sums
                ]
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


def _accumulate(builder: Any, xs: list[Any], ws: list[Any], sums: list[list[Any]], at: Any, kind: Any) -> None:
    """Add x[at] * w[at] to each sum, of one number or of a vector."""
    loaded = [load(builder, builder.gep(w, [at]), kind) for w in ws]
    for x, line in zip(xs, sums, strict=True):
        factor = load(builder, builder.gep(x, [at]), kind)
        for w, total in zip(loaded, line, strict=True):
            add_product(builder, factor, w, total)
