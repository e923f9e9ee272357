"""Triton kernel for lora_core::absmax_dequantize: the scales of a 4-bit weight from their 8-bit codes.

    absmax[i] = level8[code[i]] * absmax2[i // block size] + offset

Product and sum are rounded separately, as the reference's are: no multiply-add may be fused. What reads a weight does
this by itself for blocks of 256 (nf4_tile.py, nf4_dequantize.py); this is for scales alone, and for other blocks.

Reference: quant/double.py
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.form import ALIGNMENT, begins_aligned, form
from lora_core.kernels.log import log_launch
from lora_core.kernels.tables import levels
from lora_core.kernels.variant import Variant
from lora_core.ops.absmax_dequantize import op
from lora_core.ops.eager import register
from lora_core.quant.double import NESTED_BLOCK_SIZE

# scales of a program, and its warps: 16 scales a thread, whose codes are loaded at once
SCALES = 1024
OPTIONS = {"num_warps": 2, "enable_fp_fusion": False}


def _absmax_dequantize_kernel(
    codes_ptr,
    absmax2_ptr,
    offset_ptr,
    levels8_ptr,
    absmax_ptr,
    count: tl.int64,
    block_size: tl.int64,
    KNOWN_BLOCK: tl.constexpr,
    SCALES: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * SCALES + tl.arange(0, SCALES)
    ok = place < count
    level8 = tl.load(levels8_ptr + tl.load(codes_ptr + place, mask=ok, other=0).to(tl.int32))
    block = place // KNOWN_BLOCK if KNOWN_BLOCK else place // block_size
    absmax2 = tl.load(absmax2_ptr + block, mask=ok, other=0.0)
    tl.store(absmax_ptr + place, level8 * absmax2 + tl.load(offset_ptr), mask=ok)


_WIDE = form(_absmax_dequantize_kernel, aligned=("count",), addresses=True)
_ODD = form(_absmax_dequantize_kernel)


def variants() -> Iterator[Variant]:
    """Every configuration the launch can choose."""
    kinds = (("blocks of 256", _WIDE, True), ("blocks of 256 odd", _ODD, True), ("any blocks", _ODD, False))
    for name, taken, known in kinds:
        yield Variant(
            name=name,
            form=taken,
            types={
                "codes_ptr": "*u8",
                **dict.fromkeys(("absmax2_ptr", "offset_ptr", "levels8_ptr", "absmax_ptr"), "*fp32"),
                **dict.fromkeys(("count", "block_size"), "i64"),
            },
            constants={"KNOWN_BLOCK": NESTED_BLOCK_SIZE * known, "SCALES": SCALES},
            options=OPTIONS,
            weights=SCALES,
        )


def launch_absmax_dequantize(codes: Tensor, absmax2: Tensor, offset: Tensor, block_size: int) -> Tensor:
    """Run the kernel; operands as checked by the op. Copies operands that are not contiguous."""
    count = codes.numel()
    absmax = absmax2.new_empty(count)
    if count == 0:
        return absmax
    known = block_size == NESTED_BLOCK_SIZE
    log_launch("absmax_dequantize", "blocks of 256" if known else "any blocks", codes, absmax2)
    codes, absmax2 = codes.contiguous(), absmax2.contiguous()
    taken = _WIDE if known and count % ALIGNMENT == 0 and begins_aligned(codes, absmax2) else _ODD
    with torch.cuda.device_of(codes):
        taken[(triton.cdiv(count, SCALES),)](
            codes,
            absmax2,
            offset,
            levels("dynamic", codes.device),
            absmax,
            count,
            block_size,
            KNOWN_BLOCK=NESTED_BLOCK_SIZE * known,
            SCALES=SCALES,
            **OPTIONS,
        )
    return absmax


register(op, "cuda", launch_absmax_dequantize)
