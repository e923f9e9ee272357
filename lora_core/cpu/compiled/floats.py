"""Elements of arrays as float32 and back, and functions of them that LLVM makes vectors of."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from lora_core.cpu.compiled.emit import SINGLE
from lora_core.cpu.compiled.jit import contracted

WORD, HALF = ir.IntType(32), ir.IntType(16)
# bits of a float32 below those of a bfloat16, whose arrays are of uint16
BELOW = WORD(16)


def _widened(_: Any, element: Any) -> Any:
    """Return an element as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if element == types.float32:
            return arguments[0]
        return builder.bitcast(builder.shl(builder.zext(arguments[0], WORD), BELOW), SINGLE)

    return (types.float32(element), generate) if element in (types.float32, types.uint16) else None


def _rounded(_: Any, array: Any, number: Any) -> Any:
    """Return a float32 as an element of an array: in bfloat16 to nearest, ties to even, of NaN as PyTorch writes it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = arguments[1]
        if array.dtype == types.float32:
            return value
        bits = builder.bitcast(value, WORD)
        odd = builder.and_(builder.lshr(bits, BELOW), WORD(1))
        nearest = builder.lshr(builder.add(bits, builder.add(odd, WORD(0x7FFF))), BELOW)
        return builder.trunc(builder.select(builder.fcmp_unordered("uno", value, value), WORD(0x7FC0), nearest), HALF)

    fits = array.dtype in (types.float32, types.uint16) and number == types.float32
    return (array.dtype(array, number), generate) if fits else None


def _power_of_two(_: Any, exponent: Any) -> Any:
    """Return half of 2 to a whole number in [-125, 128], given as that and WHOLE in float32; 0 of -126."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # the number is what the last bits say, and half of the power has 126 and it as its exponent
        exponent = builder.shl(builder.bitcast(arguments[0], WORD), WORD(23))
        return builder.bitcast(builder.add(exponent, WORD(126 << 23)), SINGLE)

    return (types.float32(exponent), generate) if exponent == types.float32 else None


def _larger(_: Any, a: Any, b: Any) -> Any:
    """Return the larger of two float32, NaN if one is. LLVM makes vectors of a chain of these, not of max."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(SINGLE, [SINGLE, SINGLE])
        maximum = builder.module.declare_intrinsic("llvm.maximum", [SINGLE], kind)
        # of zeros either: of which sign would take longer to tell
        return builder.call(maximum, arguments, fastmath=("nsz",))

    return (types.float32(a, b), generate) if a == b == types.float32 else None


# in compiled code: (element), (array, number), (exponent), (number, number)
widened: Any = intrinsic(_widened)
rounded: Any = intrinsic(_rounded)
_half_of_two_to: Any = intrinsic(_power_of_two)
larger: Any = intrinsic(_larger)

ZERO, ONE = np.float32(0), np.float32(1)
# a float32 as large has no places behind the point: added, it rounds a small number to a whole one
WHOLE = np.float32(3 * 2**22)
LOG2_E = np.float32(1.4426950408889634)
# ln 2 as the sum of a number of few bits, whose products with whole numbers up to 128 are exact, and the rest
LN2_HIGH, LN2_LOW = np.float32(0.693145751953125), np.float32(1.42860682030941723e-6)
# exp(r) - 1 - r over r^2, where |r| <= ln 2 / 2: the series of exp to the degree whose rest is below 2^-26
TERMS = tuple(np.float32(1 / n) for n in (5040, 720, 120, 24, 6, 2))
LEAST, MOST = np.float32(-87), np.float32(89)


@contracted
def logistic(x: Any) -> Any:
    """Return 1 / (1 + exp(-x)) of a float32 that is no NaN; 0 from where exp(-x) is no float32."""
    # 2^128 is no float32: a half of it, twice
    half = half_of_exp(min(-x, MOST))
    return ONE / (ONE + (half + half))


@contracted
def half_of_exp(x: Any) -> Any:
    """Return exp(x) / 2 of a float32 that is at most 89: 0 where x is below -87, NaN where x is.

    From 2^-126 down, where a float32 has fewer bits, it may be 0 already.
    """
    z = max(x, LEAST)
    shifted = z * LOG2_E + WHOLE
    n = shifted - WHOLE
    f = (z - n * LN2_HIGH) - n * LN2_LOW
    p = TERMS[0]
    for i in range(1, len(TERMS)):
        p = p * f + TERMS[i]
    return (p * f * f + f + ONE) * _half_of_two_to(shifted)
