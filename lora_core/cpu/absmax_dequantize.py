"""lora_core::absmax_dequantize on the CPU, by compiled loops where Numba is installed."""

import functools

import torch
from torch import Tensor

from lora_core.cpu import compiled
from lora_core.cpu.chunks import run, share
from lora_core.cpu.plain import nf4 as plain
from lora_core.cpu.scales import Scales
from lora_core.ops.absmax_dequantize import check_second_level, op
from lora_core.ops.eager import register

# scales worth a range, and a thread or a call of NumPy's: 4 and 60 us of loops
SHARED, CHUNK = 2**12, 2**16


def absmax_dequantize(codes: Tensor, absmax2: Tensor, offset: Tensor, block_size: int) -> Tensor:
    """Return what the reference returns, bit for bit."""
    # loops by the byte would read past an end
    check_second_level(codes, absmax2, block_size)
    scales, count = Scales.of(codes, absmax2, offset, block_size), codes.numel()
    loops = compiled.load_for("nf4", count)
    if loops is None:
        run(functools.partial(plain.decode_scales, scales), count, CHUNK)
    else:
        share(loops.dequantize_absmax, count, SHARED, CHUNK, scales)
    return torch.from_numpy(scales.values)


register(op, "cpu", absmax_dequantize)
