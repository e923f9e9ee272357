"""lora_core::nf4_dequantize on the CPU, by compiled loops where Numba is installed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_core.cpu import compiled
from lora_core.cpu.allocate import empty, is_resident
from lora_core.cpu.chunks import CHUNK, GRAIN, SHARED, run, share
from lora_core.cpu.plain import nf4 as plain
from lora_core.cpu.processor import INTEL, maker
from lora_core.cpu.scales import Scales
from lora_core.ops.eager import register
from lora_core.ops.nf4_dequantize import op
from lora_core.quant.double import NESTED_BLOCK_SIZE
from lora_core.quant.parts import check_parts

# from so large a result on compiled loops write past the caches: on two cores of an Intel Xeon as fast at 2 MiB, at 8
# 1.2 to 1.5 times; with a product of the result after it 1.0 to 1.15 times; on two of an AMD EPYC 0.92 to 0.97 times up
# to 64 MiB, 1.04 times at 112. Not into pages that the system has yet to give: it fills them with zeros, which the
# caches hold then, and so it took up to 1.2 times as long
STREAMED_BYTES = 2**22 if maker() == INTEL else 2**27


def nf4_dequantize(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    block_size: int,
    nested_block_size: int = NESTED_BLOCK_SIZE,
) -> Tensor:
    """Return what the reference returns, bit for bit, with 8 bytes an element, at most 2 MiB, of scratch a thread."""
    # loops by the byte would read past an end
    check_parts("nf4_dequantize", codes, absmax, nested_absmax, nested_offset, shape, block_size, nested_block_size)
    # the largest first: what follows must not take a piece of the freed memory it fits in
    dense = empty(shape, dtype)
    flat, packed = dense.view(-1), codes.numpy().ravel()
    scales, count = Scales.of(absmax, nested_absmax, nested_offset, nested_block_size), flat.numel()
    loops = compiled.load_for("nf4", count)
    out = _writable(flat, loops)
    if loops is not None and out is not None:
        streamed = dense.nbytes >= STREAMED_BYTES and is_resident(dense)
        share(loops.dequantize, count, SHARED, CHUNK, packed, scales, out, block_size, streamed)
        return dense

    by = loops or plain

    def work(first: int, last: int) -> None:
        by.decode_scales(scales, first // block_size, -(-last // block_size))
        if out is not None:
            by.decode(packed, scales.values, out[first:last], block_size, first, last, False)
            return
        values = torch.empty(min(CHUNK, last - first), dtype=torch.float32)
        for start in range(first, last, CHUNK):
            stop = min(start + CHUNK, last)
            decoded = values[: stop - start]
            by.decode(packed, scales.values, decoded.numpy(), block_size, start, stop, False)
            torch._foreach_copy_(flat[start:stop].split(GRAIN), decoded.split(GRAIN))

    run(work, count)
    return dense


def _writable(flat: Tensor, loops: Any) -> Any:
    """Return a result as loops can write it, or None where its dtype is none of theirs; None are NumPy's loops."""
    if flat.dtype == torch.float32:
        return flat.numpy()
    if flat.dtype == torch.bfloat16 and loops is not None:
        return flat.view(torch.uint16).numpy()
    if flat.dtype == torch.float16 and loops is not None and loops.ROUNDS_TO_FLOAT16:
        return flat.view(torch.int16).numpy()
    return None


register(op, "cpu", nf4_dequantize)
