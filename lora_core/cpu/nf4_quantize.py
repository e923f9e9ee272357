"""lora_core::nf4_quantize on the CPU, by compiled loops where Numba is installed."""

import torch
from torch import Tensor

from lora_core.cpu import compiled
from lora_core.cpu.chunks import CHUNK, GRAIN, run
from lora_core.cpu.plain import nf4 as plain
from lora_core.ops.eager import register
from lora_core.ops.nf4_quantize import op
from lora_core.quant.blockwise import BLOCK_SIZES
from lora_core.reference import nf4 as reference


def nf4_quantize(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return what the reference returns, bit for bit, with 10 bytes an element, at most 2.5 MiB, of scratch a thread.

    A weight that is not contiguous is copied first, in its own dtype.
    """
    if block_size not in BLOCK_SIZES:
        return reference.nf4_quantize(weight, block_size)
    flat = weight.detach().reshape(-1)
    packed = torch.empty((flat.numel() + 1) // 2, 1, dtype=torch.uint8)
    absmax = torch.empty(-(-flat.numel() // block_size), dtype=torch.float32)
    loops = compiled.load_for("nf4", flat.numel()) or plain

    def work(first: int, last: int) -> None:
        values = torch.empty(min(CHUNK, last - first), dtype=torch.float32)
        for start in range(first, last, CHUNK):
            stop = min(start + CHUNK, last)
            part = values[: stop - start]
            torch._foreach_copy_(part.split(GRAIN), flat[start:stop].split(GRAIN))
            codes, scales = packed.view(-1)[start // 2 : (stop + 1) // 2], absmax[start // block_size :]
            loops.encode(part.numpy(), codes.numpy(), scales[: -(-part.numel() // block_size)].numpy(), block_size)

    run(work, flat.numel())
    return packed, absmax


register(op, "cpu", nf4_quantize)
