"""What each kernel has to move and to multiply, by its configuration and the sizes of its work.

Every operand is read once and every result written once. Left out, as they are small beside these: a bias, a seed,
tables of levels and of rows, and of a split sum all parts but one. Below, e and l are the bytes of an element of x, W
and y, and of A, B and S; gradients have the dtype of what they are of.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.shapes import GPU_WEIGHTS, ordered
from lora_core.quant.double import NESTED_BLOCK_SIZE

Shape = dict[str, int]

SIZE = {"fp32": 4, "fp16": 2, "bf16": 2}
FLOAT32 = 4
# elements that share a scale: the format's, and what makes each word have a scale of its own
BLOCK_SIZE, SMALL_BLOCK_SIZE = 64, 32
# a step of training; the most that have the weight decoded inside; one of generation
MANY, SOME, ONE = 4096, 64, 1
# by rows of a kernel's tile, tokens that a launch takes it for
TOKENS = {
    "low_rank_matmul": {16: ONE, 32: MANY, 64: SOME, 128: MANY},
    "nf4_matmul": {16: ONE, 64: SOME},
    "shrink": {16: ONE, 32: MANY, 64: MANY},
}
# kernels that are predicted for a step of training alone
OF_MANY = ("rms_norm", "rotary", "row_sum", "swiglu")
# rows of a batch of which each has an adapter of its own
ADAPTERS = 64


@dataclass(frozen=True)
class Work:
    """What a kernel has to do, however it does it.

    Args:
        moved: bytes.
        multiplied: multiply-adds, by the dtype of what is multiplied.
        elements: of the result, where instructions are counted for each; else 0.
    """

    moved: float
    multiplied: tuple[tuple[str, int], ...] = ()
    elements: int = 0

    @property
    def operations(self) -> int:
        """Of products in half precision, which tensor cores make: a multiply-add is two."""
        return sum(2 * count for dtype, count in self.multiplied if dtype != "fp32")

    @property
    def single(self) -> int:
        """Multiply-adds that are an instruction of a thread each: those of float32."""
        return sum(count for dtype, count in self.multiplied if dtype == "fp32")


def shapes_of(kernel: str, variant: Any) -> list[Shape]:
    """Return the sizes of work to predict a configuration for: weights, and as many ranks as a step has."""
    if kernel not in WORK:
        return []
    more: Shape = {}
    if kernel in TOKENS:
        more["M"] = TOKENS[kernel][variant.constants["BLOCK_M"]]
    elif kernel in OF_MANY:
        more["M"] = MANY
    elif kernel.startswith("gather_"):
        more |= {"M": ADAPTERS, "G": ADAPTERS}
    if "BLOCK_R" in variant.constants:
        more["R"] = variant.constants["BLOCK_R"]
    return [ordered({**weight, **more}) for weight in GPU_WEIGHTS]


def _nf4_bytes(n: int, words: list[str], block: int) -> float:
    """Codes of n elements, and scales of each block: float32, or a byte and of 256 a float32 more."""
    return n / 2 + n / block * (1 + FLOAT32 / NESTED_BLOCK_SIZE if "nested" in words else FLOAT32)


def _block(words: list[str]) -> int:
    return SMALL_BLOCK_SIZE if "words" in words else BLOCK_SIZE


def _whole_weight(variant: Any, shape: Shape) -> Work:
    """Between W [N, K] and its codes and scales, in blocks as the name says."""
    n, words = shape["N"] * shape["K"], variant.name.split()
    return Work(n * SIZE[words[0]] + _nf4_bytes(n, words, int(words[1])), elements=n)


def _columns(variant: Any, shape: Shape) -> Work:
    """Codes and scales to W [N, K], in all the panels that it is made in."""
    n, words = shape["N"] * shape["K"], variant.name.split()
    return Work(n * SIZE[words[0]] + _nf4_bytes(n, words, _block(words)), elements=n)


def _scales(variant: Any, shape: Shape) -> Work:
    """Scales of W [N, K], between float32 and a byte with a float32 for each of the second level."""
    scales = shape["N"] * shape["K"] // BLOCK_SIZE
    return Work(scales * (FLOAT32 + 1 + FLOAT32 / NESTED_BLOCK_SIZE), elements=scales)


def _linear(variant: Any, shape: Shape, weight: float | None) -> Work:
    """y [M, N] = x W^T + S B^T: e (M K + M N) + l R (M + N) and W; M N K and M N R.

    Transposed, the gradient by x, N and K change places.
    """
    words = variant.name.split()
    dtype, low = words[:2]
    m, n, k, r = (shape[size] for size in "MNKR")
    n, k = (k, n) if "transposed" in words else (n, k)
    weight = SIZE[dtype] * n * k if weight is None else weight
    dense = m * k + m * n * (2 if "added" in words else 1)
    return Work(weight + SIZE[dtype] * dense + SIZE[low] * r * (m + n), ((dtype, m * n * k), (low, m * n * r)))


def _low_rank_matmul(variant: Any, shape: Shape) -> Work:
    """A product with a dense W."""
    return _linear(variant, shape, None)


def _nf4_matmul(variant: Any, shape: Shape) -> Work:
    """A product with codes and scales."""
    words = variant.name.split()
    return _linear(variant, shape, _nf4_bytes(shape["N"] * shape["K"], words, _block(words)))


def _shrink(variant: Any, shape: Shape) -> Work:
    """S [M, R] = x A^T: e M K + l R (K + M); M K R. Transposed, dL/dS from dL/dy: N for K. A part is float32."""
    words = variant.name.split()
    dtype, low = words[:2]
    m, r, length = shape["M"], shape["R"], shape["N" if "transposed" in words else "K"]
    of_s = FLOAT32 if "split" in words else SIZE[low]
    return Work(SIZE[dtype] * m * length + SIZE[low] * r * length + of_s * m * r, ((low, m * length * r),))


def _row_sum(variant: Any, shape: Shape) -> Work:
    """P [C, R] = D^T T: e M C + l R (M + C); M C R. D is dL/dy, C = N; transposed it is x, C = K. A part is float32.

    With "hidden", D B for each block of columns too: B [C, R], and 4 M R bytes a block.
    """
    words = variant.name.split()
    dtype, low = words[:2]
    m, r, columns = shape["M"], shape["R"], shape["K" if "transposed" in words else "N"]
    of_p = FLOAT32 if "split" in words else SIZE[low]
    moved = SIZE[dtype] * m * columns + SIZE[low] * m * r + of_p * columns * r
    products = 1
    if "hidden" in words:
        moved += SIZE[low] * columns * r + FLOAT32 * m * r * math.ceil(columns / variant.constants["BLOCK_C"])
        products = 2
    return Work(moved, ((low, products * m * columns * r),))


def _gather(variant: Any, shape: Shape, wide: int) -> Work:
    """Rows of C columns and as many ranks, each by its own of G matrices: e wide M C + l R (M + G C); M C R.

    C is N where a scaling takes part, which goes with B, else K.
    """
    words = variant.name.split()
    dtype, low = words[:2]
    m, r, adapters, columns = shape["M"], shape["R"], shape["G"], shape["N" if "scaled" in words else "K"]
    narrow = SIZE[low] * r * (m + adapters * columns)
    return Work(SIZE[dtype] * wide * m * columns + narrow, ((low, m * columns * r),))


def _gather_expand(variant: Any, shape: Shape) -> Work:
    """y, and the base where there is one."""
    return _gather(variant, shape, 2 if "base" in variant.name.split() else 1)


def _gather_row(variant: Any, shape: Shape) -> Work:
    """x or dL/dy once; of a gradient, the matrices are what is written."""
    return _gather(variant, shape, 1)


def _dora_norm(variant: Any, shape: Shape) -> Work:
    """|W|^2 and W A^T beside B by rows: W, l R (N + K) and 4 N bytes; N K R, and N K squares in float32."""
    words = variant.name.split()
    dtype, low = words[:2]
    n, k, r = (shape[size] for size in "NKR")
    weight = SIZE[dtype] * n * k if "dense" in words else _nf4_bytes(n * k, words, _block(words))
    return Work(weight + SIZE[low] * r * (n + k) + FLOAT32 * n, ((low, n * k * r), ("fp32", n * k)))


def _rms_norm(variant: Any, shape: Shape) -> Work:
    """Rows as W leaves them: y [M, N] of x, or dL/dx of dL/dy and x: e M N of each; w, and 4 M bytes of r.

    With "weight", a part of dL/dw too: 4 N bytes.
    """
    words = variant.name.split()
    m, n, e = shape["M"], shape["N"], SIZE[words[0]]
    part = FLOAT32 * n if "weight" in words else 0
    return Work(e * n * (m * (3 if "backward" in words else 2) + 1) + FLOAT32 * m + part)


def _rotary(variant: Any, shape: Shape) -> Work:
    """y [M, N] of x, N / D heads of D elements, and cosines and sines [M, D]: 2 e M (N + D)."""
    head = 2 * variant.constants["BLOCK_D"]
    return Work(SIZE[variant.name.split()[0]] * 2 * shape["M"] * (shape["N"] + head))


def _swiglu(variant: Any, shape: Shape) -> Work:
    """What W is given: y [M, K] of two operands, or two gradients of three: 3 or 5 e M K."""
    words, n = variant.name.split(), shape["M"] * shape["K"]
    return Work(SIZE[words[0]] * n * (5 if "backward" in words else 3), elements=n)


WORK: dict[str, Callable[[Any, Shape], Work]] = {
    "absmax_dequantize": _scales,
    "absmax_quantize": _scales,
    "dora_norm": _dora_norm,
    "gather_expand": _gather_expand,
    "gather_gradient": _gather_row,
    "gather_shrink": _gather_row,
    "low_rank_matmul": _low_rank_matmul,
    "nf4_columns": _columns,
    "nf4_dequantize": _whole_weight,
    "nf4_matmul": _nf4_matmul,
    "nf4_quantize": _whole_weight,
    "rms_norm": _rms_norm,
    "rotary": _rotary,
    "row_sum": _row_sum,
    "shrink": _shrink,
    "swiglu": _swiglu,
}
