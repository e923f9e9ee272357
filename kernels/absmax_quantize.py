"""Triton kernel for lora_core::absmax_quantize: the scales of a 4-bit weight in 8 bits, exact nearest.

    v[i] = absmax[i] - offset        absmax2[j] = max |v[i]| of block j
    code[i] = the level nearest to v[i] / absmax2[j], a tie going to the even code

A program owns whole blocks of 256 scales, the format's; other blocks take the reference. Reads 4 bytes a scale and
writes one.

Reference: quant/double.py
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.form import ALIGNMENT, begins_aligned, form
from lora_core.kernels.log import log_launch
from lora_core.kernels.tables import thresholds
from lora_core.kernels.tile import nearest_code
from lora_core.kernels.variant import Variant
from lora_core.ops.absmax_quantize import op
from lora_core.ops.eager import register
from lora_core.quant import double as reference
from lora_core.quant.double import NESTED_BLOCK_SIZE

# scales of a program, and its warps: 16 scales a thread, whose codes are stored at once
SCALES = 1024
BLOCKS = SCALES // NESTED_BLOCK_SIZE
OPTIONS = {"num_warps": 2, "enable_fp_fusion": True}


def _absmax_quantize_kernel(
    absmax_ptr,
    offset_ptr,
    tree_ptr,
    codes_ptr,
    absmax2_ptr,
    count: tl.int64,
    BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    place = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    ok = place < count
    offset = tl.load(offset_ptr)
    v = tl.where(ok, tl.load(absmax_ptr + place, mask=ok, other=0.0) - offset, 0.0)
    absmax2 = tl.max(tl.abs(v), axis=1)
    tl.store(absmax2_ptr + block, absmax2, mask=block * BLOCK_SIZE < count)
    # a block of equal scales gets the code of zero
    divisor = tl.where(absmax2 == 0.0, 1.0, absmax2)
    quotient = tl.div_rn(v, tl.broadcast_to(divisor[:, None], (BLOCKS, BLOCK_SIZE)))
    tree = tl.load(tree_ptr + tl.arange(0, 256))
    code = nearest_code(tl.reshape(quotient, (BLOCKS * BLOCK_SIZE,)), tree, 256, 8).to(tl.uint8)
    tl.store(codes_ptr + place, tl.reshape(code, (BLOCKS, BLOCK_SIZE)), mask=ok)


_WIDE = form(_absmax_quantize_kernel, aligned=("count",), addresses=True)
_ODD = form(_absmax_quantize_kernel)


def variants() -> Iterator[Variant]:
    """Every configuration the launch can choose."""
    for kind, taken in (("", _WIDE), (" odd", _ODD)):
        yield Variant(
            name=f"blocks of 256{kind}",
            form=taken,
            types={
                **dict.fromkeys(("absmax_ptr", "offset_ptr", "tree_ptr", "absmax2_ptr"), "*fp32"),
                "codes_ptr": "*u8",
                "count": "i64",
            },
            constants={"BLOCKS": BLOCKS, "BLOCK_SIZE": NESTED_BLOCK_SIZE},
            options=OPTIONS,
            weights=SCALES,
        )


def launch_absmax_quantize(absmax: Tensor, offset: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Run the kernel; operands as checked by the op. Copies scales that are not contiguous."""
    if block_size != NESTED_BLOCK_SIZE:
        log_launch("absmax_quantize", "blocks of other than 256, reference", absmax)
        return reference.quantize_absmax(absmax, offset, block_size)
    count = absmax.numel()
    blocks = triton.cdiv(count, block_size)
    codes, absmax2 = absmax.new_empty(count, dtype=torch.uint8), absmax.new_empty(blocks)
    if count == 0:
        return codes, absmax2
    log_launch("absmax_quantize", "kernel", absmax)
    absmax = absmax.contiguous()
    taken = _ODD if count % ALIGNMENT or not begins_aligned(absmax) else _WIDE
    with torch.cuda.device_of(absmax):
        taken[(triton.cdiv(blocks, BLOCKS),)](
            absmax,
            offset,
            thresholds("dynamic", absmax.device),
            codes,
            absmax2,
            count,
            BLOCKS=BLOCKS,
            BLOCK_SIZE=NESTED_BLOCK_SIZE,
            **OPTIONS,
        )
    return codes, absmax2


register(op, "cuda", launch_absmax_quantize)
