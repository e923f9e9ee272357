"""Triton kernel for lora_core::absmax_dequantize: the scales of a 4-bit weight from their 8-bit codes.

    absmax[i] = level8[code[i]] * absmax2[i // BLOCK_SIZE] + offset

Product and sum are rounded separately, as the reference's are: no multiply-add may be fused. The dequantisation of a
weight does this by itself (kernels/nf4_dequantize.py); this is for scales alone.

Reference: quant/double.py
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.crossover import log_launch
from lora_core.kernels.form import ALIGNMENT, begins_aligned, form
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
    BLOCK_SIZE: tl.constexpr,
    SCALES: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * SCALES + tl.arange(0, SCALES)
    ok = place < count
    level8 = tl.load(levels8_ptr + tl.load(codes_ptr + place, mask=ok, other=0).to(tl.int32))
    absmax2 = tl.load(absmax2_ptr + place // BLOCK_SIZE, mask=ok, other=0.0)
    tl.store(absmax_ptr + place, level8 * absmax2 + tl.load(offset_ptr), mask=ok)


_WIDE = form(_absmax_dequantize_kernel, aligned=("count",), addresses=True)
_ODD = form(_absmax_dequantize_kernel)


def variants() -> Iterator[Variant]:
    """The configurations for blocks of 256, the format's own."""
    for kind, taken in (("", _WIDE), (" odd", _ODD)):
        yield Variant(
            name=f"blocks of 256{kind}",
            form=taken,
            types={
                "codes_ptr": "*u8",
                **dict.fromkeys(("absmax2_ptr", "offset_ptr", "levels8_ptr", "absmax_ptr"), "*fp32"),
                "count": "i64",
            },
            constants={"BLOCK_SIZE": NESTED_BLOCK_SIZE, "SCALES": SCALES},
            options=OPTIONS,
            weights=SCALES,
        )


def launch_absmax_dequantize(codes: Tensor, absmax2: Tensor, offset: Tensor, block_size: int) -> Tensor:
    """Run the kernel; operands as checked by the op. Copies operands that are not contiguous."""
    count = codes.numel()
    absmax = absmax2.new_empty(count)
    if count == 0:
        return absmax
    log_launch("absmax_dequantize", "kernel", codes, absmax2)
    codes, absmax2 = codes.contiguous(), absmax2.contiguous()
    taken = _ODD if count % ALIGNMENT or not begins_aligned(codes, absmax2) else _WIDE
    with torch.cuda.device_of(codes):
        taken[(triton.cdiv(count, SCALES),)](
            codes,
            absmax2,
            offset,
            levels("dynamic", codes.device),
            absmax,
            count,
            BLOCK_SIZE=block_size,
            SCALES=SCALES,
            **OPTIONS,
        )
    return absmax


register(op, "cuda", launch_absmax_dequantize)
