"""Products of few rows with an NF4 weight and with its transpose, decoded on the way."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_core.cpu import compiled
from lora_core.cpu.chunks import CHUNK, SHARED, share
from lora_core.cpu.processor import has_avx512, multiplies_bfloat16_tiles
from lora_core.cpu.scales import Scales
from lora_core.ops.packed import Packed
from lora_core.quant.blockwise import BLOCK_SIZES
from lora_core.quant.parts import check_parts

# more rows are faster with a dense copy of the weight: with AVX-512 of [4096, 4096] from 60 rows on, of [11008, 4096]
# from 50, on two cores; in bfloat16 from 12 rows on where the processor multiplies tiles of it by itself (AMX)
FEW_ROWS = {torch.float32: 48 if has_avx512() else 32, torch.bfloat16: 12 if multiplies_bfloat16_tiles() else 32}
# a smaller weight is not worth loading Numba for; as sums are rounded in an order of their own here, whether it is
# loaded already must not decide
LEAST = 2**16
# partial sums over the rows of the weight
PARTS = 16
# what a row of the weight is decoded into, with the weight's values rounded to the dtype of x
ROOMS = {torch.float32: np.float32, torch.bfloat16: np.uint32}


def _loops(rows: Tensor, w: Packed) -> Any:
    """Return the compiled loops, or None where they are not for so many rows or this weight.

    Raises:
        ShapeError: if a part of the weight is too short.
    """
    if not 0 < len(rows) <= FEW_ROWS.get(rows.dtype, 0):
        return None
    fits = w.shape[0] * w.shape[1] >= LEAST and w.block_size in BLOCK_SIZES
    of_scales = torch.float32 if w.nested_absmax is None else torch.uint8
    if not fits or w.codes.dtype != torch.uint8 or w.absmax.dtype != of_scales:
        return None
    loops = compiled.load("nf4_product")
    if loops is not None and not _reaches(w):
        # loops by the byte would read past an end: say what does not fit
        check_parts("nf4_lora_linear", *w)
    return loops


def _reaches(w: Packed) -> bool:
    """Say whether all parts are as long as the weight needs: what check_parts would take longer to say."""
    n = w.shape[0] * w.shape[1]
    scales = w.absmax.numel()
    nested = w.nested_absmax is None or w.nested_absmax.numel() * w.nested_block_size >= scales
    return 2 * w.codes.numel() >= n and scales * w.block_size >= n and nested


def _codes_and_scales(w: Packed) -> tuple[np.ndarray, Scales]:
    """Return the weight's codes and its scales."""
    scales = Scales.of(w.absmax, w.nested_absmax, w.nested_offset, w.nested_block_size)
    return w.codes.numpy().ravel(), scales


def few_rows(x: Tensor, w: Packed) -> Tensor | None:
    """Return x W^T in float32 [M, N], x [M, K], W [N, K] as rounded to x's dtype; None where this is not for it.

    With x and the scales of W in float32, 4 (K + block_size) more of scratch a thread, at most, and no copy of W.
    """
    n, k = w.shape
    loops = _loops(x, w)
    if loops is None:
        return None
    y = torch.empty(len(x), n, dtype=torch.float32)
    rows = x.detach().float().resolve_neg()
    if len(x) <= loops.PICKED_ROWS and k % loops.STEP == 0:
        multiply, size = loops.multiply_picked, int(w.block_size).bit_length() - 1
        rows = rows.reshape(len(x), -1, 2).transpose(1, 2)
    else:
        multiply, size = loops.multiply, w.block_size
    arguments = *_codes_and_scales(w), rows.contiguous().numpy(), np.empty(0, ROOMS[x.dtype]), y.numpy(), size
    share(multiply, n, max(SHARED // k, 1), max(CHUNK // k, 1), *arguments)
    return y


def few_rows_back(d_y: Tensor, w: Packed) -> Tensor | None:
    """Return d_y W in float32 [M, K], d_y [M, N], W [N, K] as rounded to d_y's dtype; None where this is not for it.

    With d_y and the scales of W in float32, and PARTS M K of scratch: parts of the sum over N, which are the same on
    any number of threads.
    """
    n, k = w.shape
    loops = _loops(d_y, w)
    if loops is None or k % loops.STEP:
        return None
    # with a dense copy sixteen rows of [4096, 4096] took 11 ms in float32 and 7 here, in bfloat16 7 and 8
    if len(d_y) > loops.PICKED_ROWS * (2 if d_y.dtype == torch.float32 else 1):
        return None
    grads, of = d_y.detach().float().resolve_neg().contiguous().numpy(), np.empty(0, ROOMS[d_y.dtype])
    part = max(-(-n // PARTS), SHARED // k, 1)
    sums = torch.zeros(-(-n // part), len(d_y), 2, k // 2, dtype=torch.float32)
    shift = int(w.block_size).bit_length() - 1
    arguments = *_codes_and_scales(w), grads, of, sums.numpy(), part, shift
    share(loops.multiply_back, n, part, max(CHUNK // k, 1), *arguments)
    return sums.sum(0).transpose(1, 2).reshape(len(d_y), k)
