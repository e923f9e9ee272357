"""lora_core::absmax_dequantize on the CPU, by compiled loops where Numba is installed."""

import torch
from torch import Tensor

from lora_core.cpu import compiled
from lora_core.cpu.chunks import run
from lora_core.cpu.plain import nf4 as plain
from lora_core.cpu.scales import Scales
from lora_core.ops.absmax_dequantize import check_second_level, op
from lora_core.ops.eager import register

# scales worth a call: 60 us of compiled loops
CHUNK = 2**16


def absmax_dequantize(codes: Tensor, absmax2: Tensor, offset: Tensor, block_size: int) -> Tensor:
    """Return what the reference returns, bit for bit."""
    # loops by the byte would read past an end
    check_second_level(codes, absmax2, block_size)
    scales = Scales(codes, absmax2, offset, block_size)
    loops = compiled.load_for("nf4", codes.numel()) or plain
    run(lambda first, last: scales.decode(loops, first, last), codes.numel(), CHUNK)
    return torch.from_numpy(scales.values)


register(op, "cpu", absmax_dequantize)
