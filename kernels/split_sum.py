"""Triton kernel that adds up the parts of a split sum in their order: no atomics, so two runs give the same bits.

    out[i] = factor (part[0, i] + part[1, i] + ...) + add[i]

A step of lora_linear and nf4_lora_linear. Bound by memory: reads 4 bytes for each element of each part, 16 at a time
where the size is a multiple of 16.
"""

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.tile import round_to, widen
from lora_core.kernels.variant import TYPES, Variant

# elements of a program; with 8 a thread, loads and stores are 16 bytes wide in every dtype
ELEMENTS = 512
WARPS = 2


# size follows the number of tokens: what matters of it is said by ALIGNED alone
@triton.jit(do_not_specialize=["parts", "size", "factor"])
def _split_sum_kernel(
    part_ptr,
    add_ptr,
    out_ptr,
    parts,
    size,
    factor,
    ADD: tl.constexpr,
    ALIGNED: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    if ALIGNED:
        # known to be a multiple of 16, it lets 16 bytes be loaded at once
        size = size // 16 * 16
    place = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    ok = place < size
    total = tl.zeros((ELEMENTS,), tl.float32)
    part = part_ptr + place
    for _ in range(parts):
        total += tl.load(part, mask=ok, other=0.0)
        part += size
    total *= factor
    if ADD:
        total += widen(tl.load(add_ptr + place, mask=ok, other=0.0))
    tl.store(out_ptr + place, round_to(total, out_ptr.dtype.element_ty), mask=ok)


def variants() -> Iterator[Variant]:
    """Every configuration the launch can choose."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for add, aligned in itertools.product((False, True), (True, False)):
            yield Variant(
                name=f"{TYPES[dtype]}{' added' * add}{' odd' * (not aligned)}",
                kernel=_split_sum_kernel,
                signature={
                    "part_ptr": "*fp32",
                    "add_ptr": f"*{TYPES[dtype]}",
                    "out_ptr": f"*{TYPES[dtype]}",
                    "parts": "i32",
                    "size": "i32",
                    "factor": "fp32",
                },
                constants={"ADD": add, "ALIGNED": aligned, "ELEMENTS": ELEMENTS},
                options={"num_warps": WARPS},
            )


def launch_split_sum(part: Tensor, dtype: torch.dtype, factor: float = 1.0, add: Tensor | None = None) -> Tensor:
    """Run the kernel.

    Args:
        part: float32, contiguous, shape [P, ...].
        dtype: of the result.
        factor: multiplies the sum.
        add: dtype of the result, shape [...], added to the sum; or None.
    Returns:
        Shape [...].
    """
    out = part.new_empty(part.shape[1:], dtype=dtype)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(part):
        _split_sum_kernel[(triton.cdiv(out.numel(), ELEMENTS),)](
            part,
            out if add is None else add.contiguous(),
            out,
            part.shape[0],
            out.numel(),
            float(factor),
            ADD=add is not None,
            ALIGNED=out.numel() % 16 == 0,
            ELEMENTS=ELEMENTS,
            num_warps=WARPS,
        )
    return out
