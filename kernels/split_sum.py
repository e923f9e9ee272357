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

from lora_core.kernels.form import ALIGNMENT, begins_aligned, form
from lora_core.kernels.tile import round_to, widen
from lora_core.kernels.variant import TYPES, Variant

# elements of a program; with 8 a thread, loads and stores are 16 bytes wide in every dtype
ELEMENTS = 512
OPTIONS = {"num_warps": 2, "enable_fp_fusion": True}


def _split_sum_kernel(
    part_ptr,
    add_ptr,
    out_ptr,
    parts,
    size: tl.int64,
    factor,
    ADD: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
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


_WIDE = form(_split_sum_kernel, aligned=("size",), addresses=True)
_ODD = form(_split_sum_kernel)


def variants() -> Iterator[Variant]:
    """Every configuration the launch can choose."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for add, (kind, taken) in itertools.product((False, True), (("", _WIDE), (" odd", _ODD))):
            yield Variant(
                name=f"{TYPES[dtype]}{' added' * add}{kind}",
                form=taken,
                types={
                    "part_ptr": "*fp32",
                    "add_ptr": f"*{TYPES[dtype]}",
                    "out_ptr": f"*{TYPES[dtype]}",
                    "size": "i64",
                    "factor": "fp32",
                },
                constants={"ADD": add, "ELEMENTS": ELEMENTS},
                options=OPTIONS,
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
    add = None if add is None else add.contiguous()
    taken = _ODD if out.numel() % ALIGNMENT or not begins_aligned(add) else _WIDE
    with torch.cuda.device_of(part):
        taken[(triton.cdiv(out.numel(), ELEMENTS),)](
            part,
            out if add is None else add,
            out,
            part.shape[0],
            out.numel(),
            float(factor),
            ADD=add is not None,
            ELEMENTS=ELEMENTS,
            **OPTIONS,
        )
    return out
