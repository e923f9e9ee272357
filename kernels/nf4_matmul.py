"""Triton kernel for a product of few tokens with an NF4 weight, which is decoded inside: no dense W, not even a part.

    forward:     y = x W^T + factor (S B^T) + b                   x [M, K], W [N, K], S [M, R], B [N, R]
    transposed:  y = x W + factor keep * (S B^T)                  x [M, N], S [M, R], B [K, R]: dL/dx from dL/dy

Reads W at half a byte an element instead of two: bound by memory, up to some 50 tokens. The weight is rounded to the
dtype of x as the dense path has it; products are exact and summed in float32. The sum is split so that there are
programs for every multiprocessor; the first part starts with the low-rank product and the bias, and the parts are
added in a fixed order and rounded once (split_sum.py).

Reference: lora_core/reference/nf4.py, lora_core/reference/lora.py
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.form import ALIGNMENT, Form, begins_aligned, form, in_wide_loads
from lora_core.kernels.nf4_levels import SHUFFLED
from lora_core.kernels.nf4_tile import ELEMENTS, argument_types, arguments, as_read, nf4_tile, per_scale, reading
from lora_core.kernels.processors import splits_to_fill
from lora_core.kernels.split_sum import launch_split_sum
from lora_core.kernels.tables import seed_or_none
from lora_core.kernels.tile import dot, low_rank_start, round_to, widen
from lora_core.kernels.variant import DTYPE_PAIRS, TYPES, Variant
from lora_core.ops.packed import Packed
from lora_core.reference.dropout import threshold

# tokens at most: beyond, W is dequantised once and a matrix product of its own is faster
MOST_TOKENS = 64
# warps; single multiply-adds take more, and 64 tokens where every word has a scale of its own: what keeps every
# configuration in registers
WARPS, MORE_WARPS = 4, 8
MOST_REGISTERS = 128
# rows and columns of W in a step: 32 weights a thread; fewer where single elements or multiply-adds take registers
TILE, SMALL_TILE = (64, 64), (32, 64)
BLOCK_R = 16
# steps whose loads are in flight: single elements have too many loads for more
STAGES = {"blocks": 2, "words": 2, ELEMENTS: 1}
# any tile is as wide as what shares a scale at most
PER_SCALE = per_scale(SMALL_TILE[1])
# terms of a part of a split sum at least, and programs wanted for each multiprocessor
SHORTEST = 256
PER_PROCESSOR = 2


def _nf4_matmul_kernel(
    x_ptr,
    codes_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    levels_ptr,
    levels8_ptr,
    bias_ptr,
    s_ptr,
    b_ptr,
    seed_ptr,
    part_ptr,
    M,
    N,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_bn,
    stride_br,
    has_bias,
    factor,
    threshold: tl.int64,
    per_split,
    block_shift,
    NESTED: tl.constexpr,
    PER_SCALE: tl.constexpr,
    SHUFFLED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row = tl.program_id(2).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    # what y has for columns, and what is summed over
    BLOCK_Y: tl.constexpr = BLOCK_K if TRANSPOSED else BLOCK_N
    BLOCK_SUM: tl.constexpr = BLOCK_N if TRANSPOSED else BLOCK_K
    width, length = (K, N) if TRANSPOSED else (N, K)
    column = tl.program_id(0).to(tl.int64) * BLOCK_Y + tl.arange(0, BLOCK_Y)

    acc = tl.zeros((BLOCK_M, BLOCK_Y), tl.float32)
    if split == 0:
        acc = low_rank_start(
            s_ptr,
            b_ptr,
            seed_ptr,
            row,
            column,
            M,
            width,
            R,
            stride_bn,
            stride_br,
            factor,
            threshold,
            BLOCK_M,
            BLOCK_Y,
            BLOCK_R,
        )
        bias = tl.load(bias_ptr + column, mask=(column < width) & (has_bias != 0), other=0.0)
        acc += widen(bias)[None, :]

    first = split * per_split
    for start in range(first, tl.minimum(first + per_split, length), BLOCK_SUM):
        term = start + tl.arange(0, BLOCK_SUM)
        x = tl.load(
            x_ptr + row[:, None] * stride_xm + term.to(tl.int64)[None, :] * stride_xk,
            mask=(row < M)[:, None] & (term < length)[None, :],
            other=0.0,
        )
        # the tile of W: BLOCK_N of its rows, BLOCK_K of its columns
        if TRANSPOSED:
            n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
            first_k = tl.program_id(0) * BLOCK_K
        else:
            n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
            first_k = start
        w = nf4_tile(
            codes_ptr,
            absmax_ptr,
            nested_absmax_ptr,
            nested_offset_ptr,
            levels_ptr,
            levels8_ptr,
            n,
            first_k,
            N,
            K,
            block_shift,
            NESTED,
            PER_SCALE,
            SHUFFLED,
            BLOCK_N,
            BLOCK_K,
        )
        w = round_to(w, x_ptr.dtype.element_ty)
        acc = dot(x, w if TRANSPOSED else tl.trans(w), acc)
    place = (split.to(tl.int64) * M + row)[:, None] * width + column[None, :]
    tl.store(
        part_ptr + place, round_to(acc, part_ptr.dtype.element_ty), mask=(row < M)[:, None] & (column < width)[None, :]
    )


# rows of x; of B ranks in any number, and of A^T rows of A
_SIZES = ("N", "K", "stride_xm", "per_split")
_WIDE = form(_nf4_matmul_kernel, ("stride_xk", "stride_br"), _SIZES, addresses=True)
_TRANSPOSED = form(_nf4_matmul_kernel, ("stride_xk", "stride_bn"), (*_SIZES, "stride_br"), addresses=True)
_LOOSE = form(_nf4_matmul_kernel)


def variants() -> Iterator[Variant]:
    """Every configuration the launch can choose."""
    uses = ("forward", "forward split", "transposed", "transposed split")
    choices = itertools.product(DTYPE_PAIRS, (16, 64), ("plain", "nested"), PER_SCALE, uses)
    for (dtype, low), block_m, scales, kind, use in choices:
        if block_m not in _rows(dtype, kind) or (use.endswith("split") and dtype == torch.float32):
            continue
        transposed = use.startswith("transposed")
        block_n, block_k = _tile(dtype, kind)
        yield Variant(
            name=f"{TYPES[dtype]} {TYPES[low]} {block_m} {scales} {kind} {use}",
            form=_form(kind, transposed),
            types={
                "x_ptr": f"*{TYPES[dtype]}",
                **argument_types(kind, scales == "nested"),
                "bias_ptr": f"*{TYPES[dtype]}",
                **dict.fromkeys(("s_ptr", "b_ptr"), f"*{TYPES[low]}"),
                "seed_ptr": "*i64",
                "part_ptr": "*fp32" if use.endswith("split") else f"*{TYPES[dtype]}",
                "factor": "fp32",
                "threshold": "i64",
            },
            constants={
                "NESTED": scales == "nested",
                "PER_SCALE": PER_SCALE[kind],
                "SHUFFLED": True,
                "TRANSPOSED": transposed,
                "BLOCK_M": block_m,
                "BLOCK_N": block_n,
                "BLOCK_K": block_k,
                "BLOCK_R": BLOCK_R,
            },
            options=_options(dtype, low, kind, block_m),
            tile_m=block_m if dtype != torch.float32 else 0,
        )


def _rows(dtype: torch.dtype, kind: str) -> tuple[int, ...]:
    """Tokens a tile may have: many where tensor cores multiply them and weights are read by the word."""
    return (16, 64) if kind != ELEMENTS and dtype != torch.float32 else (16,)


def _tile(dtype: torch.dtype, kind: str) -> tuple[int, int]:
    return TILE if kind != ELEMENTS and dtype != torch.float32 else SMALL_TILE


def _form(kind: str, transposed: bool) -> Form:
    wide = _TRANSPOSED if transposed else _WIDE
    return _LOOSE if kind == ELEMENTS else wide


def _kind(x: Tensor, w: Packed, hidden: Tensor, lora_b: Tensor, transposed: bool) -> str:
    """Return how W is read: element by element too where another operand has to be."""
    low_wide = in_wide_loads(lora_b, 0) if transposed else lora_b.stride(1) == 1
    wide = in_wide_loads(x) and w.shape[0] % ALIGNMENT == 0 and low_wide and begins_aligned(hidden, lora_b)
    return reading(w, SMALL_TILE[1]) if wide else ELEMENTS


def _options(dtype: torch.dtype, low: torch.dtype, kind: str, block_m: int) -> dict[str, Any]:
    # four programs a multiprocessor are enough: for more the compiler would keep registers in memory
    mixed = kind != ELEMENTS and dtype != low
    more = kind != ELEMENTS and (dtype == torch.float32 or (kind == "words" and block_m > 16))
    return {
        "num_warps": MORE_WARPS if more else WARPS,
        "num_stages": STAGES[kind],
        "enable_fp_fusion": False,
        **({"maxnreg": MOST_REGISTERS} if mixed and block_m == 16 else {}),
    }


def launch_nf4_matmul(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    block_size: int,
    nested_block_size: int,
    bias: Tensor | None,
    hidden: Tensor,
    lora_b: Tensor,
    factor: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    transposed: bool = False,
    splits: int | None = None,
    shuffled: bool = SHUFFLED,
) -> Tensor:
    """Run the kernel; any strides of x and lora_b. Copies codes, scales, a bias or an S that are not contiguous.

    Args:
        x: float32, float16 or bfloat16, at most MOST_TOKENS rows: shape [M, K], or with transposed [M, N].
        codes, absmax, nested_absmax, nested_offset, shape, block_size, nested_block_size: W, as in nf4_dequantize.
        bias: dtype of x, shape [N], or None; none with transposed.
        hidden: S, dtype of lora_b, shape [M, R].
        lora_b: dtype of x or float32, shape [N, R], or with transposed [K, R].
        factor: multiplies the low-rank product.
        dropout: probability with which elements of the low-rank product are left out, with transposed.
        seed: int64, one element; needed where dropout > 0.
        transposed: multiply by W instead of W^T.
        splits: parts of the sum; by default as many as fill the device.
        shuffled: whether levels are fetched by shuffles, which the interpreter cannot do, or from a table.
    Returns:
        Shape [M, N], or with transposed [M, K]; dtype of x.
    """
    n, k = shape
    m, r = x.shape[0], lora_b.shape[1]
    width, length = (k, n) if transposed else (n, k)
    w = as_read(Packed(codes, absmax, nested_absmax, nested_offset, shape, block_size, nested_block_size))
    hidden = hidden.contiguous()
    kind = _kind(x, w, hidden, lora_b, transposed)
    block_n, block_k = _tile(x.dtype, kind)
    block_y, block_sum = (block_k, block_n) if transposed else (block_n, block_k)
    block_m = _rows(x.dtype, kind)[-1 if m > 16 else 0]
    tiles = triton.cdiv(width, block_y)
    splits = splits or splits_to_fill(
        x.device, triton.cdiv(tiles * triton.cdiv(m, block_m), PER_PROCESSOR), length, SHORTEST
    )
    per_split = triton.cdiv(triton.cdiv(max(length, 1), splits), block_sum) * block_sum
    splits = triton.cdiv(max(length, 1), per_split)
    # what one program sums alone it rounds itself
    together = splits == 1
    part = x.new_empty((splits, m, width), dtype=x.dtype if together else torch.float32)
    if part.numel():
        with torch.cuda.device_of(x):
            _form(kind, transposed)[(tiles, splits, triton.cdiv(m, block_m))](
                x,
                *arguments(w, kind),
                x if bias is None else bias.contiguous(),
                hidden,
                lora_b,
                seed_or_none(seed, dropout, x.device),
                part,
                m,
                n,
                k,
                r,
                *x.stride(),
                *lora_b.stride(),
                int(bias is not None),
                float(factor),
                threshold(dropout),
                per_split,
                block_size.bit_length() - 1,
                NESTED=w.nested_absmax is not None,
                PER_SCALE=PER_SCALE[kind],
                SHUFFLED=shuffled,
                TRANSPOSED=transposed,
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                BLOCK_K=block_k,
                BLOCK_R=BLOCK_R,
                **_options(x.dtype, lora_b.dtype, kind, block_m),
            )
    return part[0] if together else launch_split_sum(part, x.dtype)
