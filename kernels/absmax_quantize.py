"""Triton kernel for lora_core::absmax_quantize: the scales of a 4-bit weight in 8 bits, exact nearest.

    v[i] = absmax[i] - offset        absmax2[j] = max |v[i]| of block j
    code[i] = the level nearest to v[i] / absmax2[j], a tie going to the even code

A program owns one block of scales. Reads 4 bytes a scale and writes one; there are few of them, so simplicity rules.

Reference: quant/double.py
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.tables import thresholds
from lora_core.kernels.tile import nearest_code
from lora_core.kernels.variant import Variant
from lora_core.ops.absmax_quantize import op
from lora_core.quant.double import NESTED_BLOCK_SIZE

WARPS = 2


# Triton makes another kernel for a count that is a multiple of 16, with wide loads and stores
@triton.jit
def _absmax_quantize_kernel(
    absmax_ptr, offset_ptr, tree_ptr, codes_ptr, absmax2_ptr, count, BLOCK_SIZE: tl.constexpr, WIDTH: tl.constexpr
):
    block = tl.program_id(0).to(tl.int64)
    inside = tl.arange(0, WIDTH)
    place = block * BLOCK_SIZE + inside
    ok = (inside < BLOCK_SIZE) & (place < count)
    offset = tl.load(offset_ptr)
    v = tl.where(ok, tl.load(absmax_ptr + place, mask=ok, other=0.0) - offset, 0.0)
    absmax2 = tl.max(tl.abs(v), axis=0)
    tl.store(absmax2_ptr + block, absmax2)
    # a block of equal scales gets the code of zero
    quotient = tl.div_rn(v, tl.broadcast_to(tl.where(absmax2 == 0.0, 1.0, absmax2), (WIDTH,)))
    tree = tl.load(tree_ptr + tl.arange(0, 256))
    tl.store(codes_ptr + place, nearest_code(quotient, tree, 256, 8).to(tl.uint8), mask=ok)


def variants() -> Iterator[Variant]:
    """The configurations for blocks of 256, the format's own."""
    for aligned in (True, False):
        yield Variant(
            name=f"blocks of 256{' odd' * (not aligned)}",
            kernel=_absmax_quantize_kernel,
            signature={
                **dict.fromkeys(("absmax_ptr", "offset_ptr", "tree_ptr", "absmax2_ptr"), "*fp32"),
                "codes_ptr": "*u8",
                "count": "i64",
            },
            constants={"BLOCK_SIZE": NESTED_BLOCK_SIZE, "WIDTH": NESTED_BLOCK_SIZE},
            aligned=("count",) if aligned else (),
            options={"num_warps": WARPS},
            weights=NESTED_BLOCK_SIZE,
        )


def launch_absmax_quantize(absmax: Tensor, offset: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Run the kernel; operands as checked by the op. Copies scales that are not contiguous."""
    count = absmax.numel()
    blocks = triton.cdiv(count, block_size)
    codes, absmax2 = absmax.new_empty(count, dtype=torch.uint8), absmax.new_empty(blocks)
    if count == 0:
        return codes, absmax2
    with torch.cuda.device_of(absmax):
        _absmax_quantize_kernel[(blocks,)](
            absmax.contiguous(),
            offset,
            thresholds("dynamic", absmax.device),
            codes,
            absmax2,
            count,
            BLOCK_SIZE=block_size,
            WIDTH=triton.next_power_of_2(block_size),
            num_warps=WARPS,
        )
    return codes, absmax2


op.register_kernel("cuda")(launch_absmax_quantize)
