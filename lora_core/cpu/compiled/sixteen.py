"""Sixteen bytes of NF4 codes decoded at a time, as LLVM's instructions.

A block has but sixteen values, its levels times its scale, and each code picks one of them, as pick.py writes it.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.errors import TypingError
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from lora_core.cpu.compiled.emit import SINGLE, in_every_lane
from lora_core.cpu.compiled.pick import LANES, WORD, every, pick
from lora_core.cpu.compiled.stream import store
from lora_core.quant.codebook import codebook

LEVELS = codebook("nf4").levels
# what so many bytes, decoded at a time, stand for
VALUES = 2 * LANES
WORDS, SINGLES, PAIRS = ir.VectorType(WORD, LANES), ir.VectorType(SINGLE, LANES), ir.VectorType(WORD, VALUES)
BYTES = ir.VectorType(ir.IntType(8), LANES)


def _decode_sixteen(_: Any, scale: Any, codes: Any, byte: Any, values: Any, place: Any, streamed: Any) -> Any:
    """Write at place the 32 values that 16 bytes of codes stand for, the high half of a byte first: levels times scale.

    What values are is said by their dtype, a key of FORMS. Where to read and write are numbers: slices, with what
    Python means by negative and too large ones, would cost more than the rest.
    """
    if {codes.layout, values.layout} != {"C"}:
        raise TypingError(f"codes and values lie in memory as {codes.layout} and {values.layout}; want contiguous ones")
    entries_of, join = FORMS[values.dtype]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def memory(at: int, kind: Any) -> Any:
            array = context.make_array(signature.args[at])(context, builder, arguments[at])
            return builder.bitcast(builder.gep(array.data, [arguments[at + 1]]), kind.as_pointer())

        joined = join(builder, *sixteen(builder, entries_of, arguments[0], memory(1, BYTES)))
        store(builder, joined, memory(3, joined.type), arguments[5])
        return context.get_dummy_value()

    return types.void(types.float32, codes, types.intp, values, types.intp, types.boolean), generate


# (scale, codes, byte, values, place, streamed) in compiled code
decode_sixteen: Any = intrinsic(_decode_sixteen)


def sixteen(builder: Any, entries_of: Any, scale: Any, bytes_at: Any) -> tuple[Any, Any]:
    """Return what the high and the low halves of 16 bytes stand for, as words."""
    entries = entries_of(
        builder, builder.fmul(ir.Constant(SINGLES, LEVELS.tolist()), in_every_lane(builder, scale, SINGLES))
    )
    codes = builder.load(builder.bitcast(bytes_at, BYTES.as_pointer()), align=1)
    index = builder.zext(codes, WORDS)
    return pick(builder, entries, builder.lshr(index, every(4))), pick(builder, entries, builder.and_(index, every(15)))


def as_float32(builder: Any, products: Any) -> Any:
    """Return the bits of the products."""
    return builder.bitcast(products, WORDS)


def as_bfloat16(builder: Any, products: Any) -> Any:
    """Return the bits of the products rounded to bfloat16, to nearest, ties to even; of NaN as PyTorch writes it."""
    bits = builder.bitcast(products, WORDS)
    odd = builder.and_(builder.lshr(bits, every(16)), every(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, every(0x7FFF))), every(16))
    return builder.select(builder.fcmp_unordered("uno", products, products), every(0x7FC0), rounded)


def as_float16(builder: Any, products: Any) -> Any:
    """Return the bits of the products rounded to float16 by the processor's own instruction."""
    halves = builder.fptrunc(products, ir.VectorType(ir.HalfType(), LANES))
    return builder.zext(builder.bitcast(halves, ir.VectorType(ir.IntType(16), LANES)), WORDS)


def as_rounded(builder: Any, products: Any) -> Any:
    """Return the bits of the products rounded to bfloat16, as float32."""
    return builder.shl(as_bfloat16(builder, products), every(16))


def in_turn(builder: Any, high: Any, low: Any) -> Any:
    """Return high[0], low[0], high[1], low[1], ..."""
    return builder.shuffle_vector(high, low, ir.Constant(PAIRS, [i // 2 + i % 2 * LANES for i in range(VALUES)]))


def in_halves(builder: Any, high: Any, low: Any) -> Any:
    """Return the same of their 16-bit halves, as words whose first half in memory is the low one."""
    return builder.or_(high, builder.shl(low, every(16)))


# of an array of values by its dtype: what the products become, and how those of high and low halves are put together.
# uint16 stands for bfloat16, int16 for float16, uint32 for float32 rounded to bfloat16
FORMS = {
    types.float32: (as_float32, in_turn),
    types.uint16: (as_bfloat16, in_halves),
    types.int16: (as_float16, in_halves),
    types.uint32: (as_rounded, in_turn),
}
# without an instruction for it LLVM would call a function that is not there. Numba is asked, not the processor: it may
# have been told to compile for another
ROUNDS_TO_FLOAT16 = "+f16c" in cpu_target.target_context.codegen().magic_tuple()[2].split(",")
