"""Triton kernel for neighbouring columns of an NF4 weight: codes and scales to W[:, first : first + width], dense.

A panel of the backward's dL/dx = dL/dy W, which sums over the rows of W: its columns can be made a panel at a time and
each is finished, while panels of rows would have to be added up. The columns of a row are a stretch of the codes, so
they are decoded by the tile (nf4_tile.py). Every operation rounds once: the bits are the reference's.

Reference: lora_core/reference/nf4.py
"""

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.form import ALIGNMENT, form
from lora_core.kernels.log import log_launch
from lora_core.kernels.nf4_levels import SHUFFLED
from lora_core.kernels.nf4_tile import ELEMENTS, argument_types, arguments, nf4_tile, per_scale, reading
from lora_core.kernels.tile import round_to
from lora_core.kernels.variant import TYPES, Variant
from lora_core.ops.packed import Packed

# rows and columns of a program of one warp: 128 weights a thread, what keeps instructions few; 16 where single elements
# take registers
TILE, SMALL_TILE = (8, 512), (4, 128)
WARPS = 1
PER_SCALE = per_scale(SMALL_TILE[1])


def _nf4_columns_kernel(
    codes_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    levels_ptr,
    levels8_ptr,
    w_ptr,
    N,
    K,
    first_tile,
    width,
    block_shift,
    NESTED: tl.constexpr,
    PER_SCALE: tl.constexpr,
    SHUFFLED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    across = tl.cdiv(width, BLOCK_K)
    tile = tl.program_id(0)
    n = (tile // across).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tile % across * BLOCK_K
    w = nf4_tile(
        codes_ptr,
        absmax_ptr,
        nested_absmax_ptr,
        nested_offset_ptr,
        levels_ptr,
        levels8_ptr,
        n,
        first_tile * BLOCK_K + begin,
        N,
        # a multiple of what shares a scale, as the compiler sees: 16 bytes are loaded at once
        K // PER_SCALE * PER_SCALE,
        block_shift,
        NESTED,
        PER_SCALE,
        SHUFFLED,
        BLOCK_N,
        BLOCK_K,
    )
    k = begin + tl.arange(0, BLOCK_K)
    ok = (n < N)[:, None] & (k < width)[None, :]
    tl.store(w_ptr + n[:, None] * width + k[None, :], round_to(w, w_ptr.dtype.element_ty), mask=ok)


# by whether rows may be of any number: those that are a multiple of 16 take one mask a tile
_FORMS = {
    False: form(_nf4_columns_kernel, aligned=("N", "K", "width"), addresses=True),
    True: form(_nf4_columns_kernel, aligned=("K", "width"), addresses=True),
}
_LOOSE = form(_nf4_columns_kernel)


def variants() -> Iterator[Variant]:
    """Every configuration the launch can choose."""
    choices = itertools.product((torch.float32, torch.float16, torch.bfloat16), ("plain", "nested"), PER_SCALE, _FORMS)
    for dtype, scales, kind, rows in choices:
        nested, words = scales == "nested", kind != ELEMENTS
        if not (words or rows):
            continue
        block_n, block_k = _tile(kind)
        yield Variant(
            name=f"{TYPES[dtype]} {scales} {kind}{' any rows' * (words and rows)}",
            form=_FORMS[rows] if words else _LOOSE,
            types={**argument_types(kind, nested), "w_ptr": f"*{TYPES[dtype]}"},
            constants={
                "NESTED": nested,
                "PER_SCALE": PER_SCALE[kind],
                "SHUFFLED": True,
                "BLOCK_N": block_n,
                "BLOCK_K": block_k,
            },
            options={"num_warps": WARPS, "enable_fp_fusion": False},
            weights=block_n * block_k,
        )


def _tile(kind: str) -> tuple[int, int]:
    return SMALL_TILE if kind == ELEMENTS else TILE


def launch_nf4_columns(w: Packed, first: int, width: int, dtype: torch.dtype, shuffled: bool = SHUFFLED) -> Tensor:
    """Return W[:, first : first + width] of W [N, K]: shape [N, width].

    Args:
        w: the weight, as as_read returns it.
        first: a multiple of TILE[1].
        width: of columns; a multiple of TILE[1] unless they are the last.
        dtype: float32, float16 or bfloat16.
        shuffled: as in launch_nf4_dequantize.
    """
    n, k = w.shape
    dense = w.codes.new_empty(n, width, dtype=dtype)
    if dense.numel() == 0:
        return dense
    kind = reading(w, SMALL_TILE[1])
    block_n, block_k = _tile(kind)
    log_launch("nf4_columns", kind)
    with torch.cuda.device_of(w.codes):
        taken = _LOOSE if kind == ELEMENTS else _FORMS[n % ALIGNMENT > 0]
        taken[(triton.cdiv(n, block_n) * triton.cdiv(width, block_k),)](
            *arguments(w, kind),
            dense,
            n,
            k,
            first // block_k,
            width,
            w.block_size.bit_length() - 1,
            NESTED=w.nested_absmax is not None,
            PER_SCALE=PER_SCALE[kind],
            SHUFFLED=shuffled,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return dense
