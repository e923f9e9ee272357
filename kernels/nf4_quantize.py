"""Triton kernel for lora_core::nf4_quantize: block maxima, nearest levels and packing in one pass over the weight.

    absmax[j] = max |w[i]| of block j        code[i] = the number of thresholds that w[i] / absmax[j] is not below

The quotient is rounded as the reference's is (div_rn): at a threshold it decides the code. A program owns whole blocks
and keeps them in registers between the maximum and the codes. Reads n elements and writes n / 2 bytes; the tree of
thresholds is searched in shared memory, four steps a weight.

Reference: lora_core/reference/nf4.py
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.form import begins_aligned, form
from lora_core.kernels.log import log_launch
from lora_core.kernels.tables import thresholds
from lora_core.kernels.tile import nearest_code, widen
from lora_core.kernels.variant import TYPES, Variant
from lora_core.ops.eager import register
from lora_core.ops.nf4_quantize import op
from lora_core.quant.blockwise import BLOCK_SIZES
from lora_core.quant.codebook import codebook

# elements of a program, the longest block there is, and its warps: 32 elements a thread
ELEMENTS = 4096
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def _nf4_quantize_kernel(
    w_ptr,
    tree_ptr,
    codes_ptr,
    absmax_ptr,
    n: tl.int64,
    BLOCK_SIZE: tl.constexpr,
    PER_UNIT: tl.constexpr,
    ELEMENTS: tl.constexpr,
    ZERO: tl.constexpr,
):
    # int64: element numbers pass 2^31; inside a program 32 bits do
    start = tl.program_id(0).to(tl.int64) * ELEMENTS
    left = tl.minimum(n - start, ELEMENTS).to(tl.int32)
    blocks: tl.constexpr = ELEMENTS // BLOCK_SIZE
    units: tl.constexpr = ELEMENTS // PER_UNIT

    # as units of what is stored together: words of eight codes, or bytes of two
    unit = tl.arange(0, units)
    place = unit[:, None] * PER_UNIT + tl.arange(0, PER_UNIT)[None, :]  # [units, PER_UNIT]
    # words come by fours: a bound known to be a multiple of four lets them be stored at once. They are whole, so that
    # one test serves all eight elements and these are loaded at once
    unit_ok = unit < left // 32 * 4 if PER_UNIT == 8 else unit * PER_UNIT < left
    place_ok = unit_ok[:, None] & (place >= 0) if PER_UNIT == 8 else place < left
    w = widen(tl.load(w_ptr + start + place, mask=place_ok, other=0.0))

    # a block is a whole number of units
    largest = tl.max(tl.abs(w), axis=1).reshape(blocks, BLOCK_SIZE // PER_UNIT)
    absmax = tl.max(largest, axis=1)  # [blocks]
    block = tl.arange(0, blocks)
    tl.store(absmax_ptr + start // BLOCK_SIZE + block, absmax, mask=block * BLOCK_SIZE < left)

    # a block of zeros gets the code of zero
    divisor = tl.where(absmax == 0.0, 1.0, absmax)
    owner = tl.broadcast_to(block[:, None], (blocks, BLOCK_SIZE // PER_UNIT)).reshape(units)
    share = tl.gather(divisor, owner, 0)  # [units]
    quotient = tl.div_rn(w, tl.broadcast_to(share[:, None], (units, PER_UNIT)))
    tree = tl.load(tree_ptr + tl.arange(0, 16))
    code = nearest_code(quotient.reshape(ELEMENTS), tree, 16, 4).reshape(units, PER_UNIT)

    if PER_UNIT == 2:
        # an odd end is followed by the code of zero
        code = tl.where(place_ok, code, ZERO)
    # the lowest byte of a word comes first, and a byte's high half before its low one
    element = tl.arange(0, PER_UNIT)
    shift = (element // 2) * 8 + (1 - element % 2) * 4
    packed = tl.sum(code << shift[None, :], axis=1)
    tl.store(codes_ptr + start // PER_UNIT + unit, packed.to(codes_ptr.dtype.element_ty), mask=unit_ok)


_FORMS = {"words": form(_nf4_quantize_kernel, addresses=True), "bytes": form(_nf4_quantize_kernel)}


def variants() -> Iterator[Variant]:
    """Every configuration the launch can choose."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for block_size in BLOCK_SIZES:
            for kind, codes, per_unit in (("words", "*i32", 8), ("bytes", "*u8", 2)):
                yield Variant(
                    name=f"{TYPES[dtype]} {block_size} {kind}",
                    form=_FORMS[kind],
                    types={
                        "w_ptr": f"*{TYPES[dtype]}",
                        "tree_ptr": "*fp32",
                        "codes_ptr": codes,
                        "absmax_ptr": "*fp32",
                        "n": "i64",
                    },
                    constants={
                        "BLOCK_SIZE": block_size,
                        "PER_UNIT": per_unit,
                        "ELEMENTS": ELEMENTS,
                        "ZERO": codebook("nf4").zero,
                    },
                    options=OPTIONS,
                    weights=ELEMENTS,
                )


def launch_nf4_quantize(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Run the kernel; operands as checked by the op. Copies a weight that is not contiguous."""
    n = weight.numel()
    codes = weight.new_empty((n + 1) // 2, 1, dtype=torch.uint8)
    absmax = weight.new_empty(triton.cdiv(n, block_size), dtype=torch.float32)
    if n == 0:
        return codes, absmax
    flat = weight.contiguous()
    # whole words, by fours
    words = n % 32 == 0 and begins_aligned(flat)
    kind = "words" if words else "bytes"
    log_launch("nf4_quantize", kind, weight)
    with torch.cuda.device_of(weight):
        _FORMS[kind][(triton.cdiv(n, ELEMENTS),)](
            flat,
            thresholds("nf4", weight.device),
            codes.view(-1).view(torch.int32) if words else codes,
            absmax,
            n,
            BLOCK_SIZE=block_size,
            PER_UNIT=8 if words else 2,
            ELEMENTS=ELEMENTS,
            ZERO=codebook("nf4").zero,
            **OPTIONS,
        )
    return codes, absmax


register(op, "cuda", launch_nf4_quantize)
