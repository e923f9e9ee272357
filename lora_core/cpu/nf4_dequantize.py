"""lora_core::nf4_dequantize on the CPU: each byte looks up a pair of levels, and the scales multiply them in place."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_core.cpu.allocate import empty
from lora_core.cpu.chunks import CHUNK, GRAIN, run
from lora_core.ops.nf4_dequantize import op
from lora_core.quant.blockwise import BLOCK_SIZES
from lora_core.quant.codebook import codebook
from lora_core.quant.double import NESTED_BLOCK_SIZE, dequantize_absmax
from lora_core.reference import nf4 as reference


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
    if block_size not in BLOCK_SIZES:
        return reference.nf4_dequantize(
            codes, absmax, nested_absmax, nested_offset, shape, dtype, block_size, nested_block_size
        )
    if nested_absmax is not None and nested_offset is not None:
        absmax = dequantize_absmax(absmax, nested_absmax, nested_offset, nested_block_size)
    dense = empty(shape, dtype)
    flat, n = dense.view(-1), dense.numel()
    packed, scales = codes.reshape(-1).numpy(), absmax[:, None]
    pairs, grain_blocks = _pairs(), GRAIN // block_size

    def work(first: int, last: int) -> None:
        room = min(CHUNK, -(-(last - first) // block_size) * block_size)
        values, index = torch.empty(room, dtype=torch.float32), np.empty(room // 2, np.intp)
        words = values.numpy().view(np.int64)

        def grains(count: int) -> tuple[Any, Any]:
            """Return the first count values in grains, once flat and once with a row for every block begun."""
            blocks = -(-count // block_size)
            rows = values[: blocks * block_size].view(blocks, block_size)
            return values[:count].split(GRAIN), rows.split(grain_blocks)

        flat_grains, row_grains = grains(room)
        for start in range(first, last, CHUNK):
            count = min(CHUNK, last - start)
            if count < room:
                flat_grains, row_grains = grains(count)
            size, blocks = (count + 1) // 2, -(-count // block_size)
            np.copyto(index[:size], packed[start // 2 :][:size])
            # an index of one byte is never out of range: the mode only spares NumPy a buffer
            np.take(pairs, index[:size], out=words[:size], mode="wrap")
            torch._foreach_mul_(row_grains, scales[start // block_size :][:blocks].split(grain_blocks))
            torch._foreach_copy_(flat[start : start + count].split(GRAIN), flat_grains)

    run(work, n)
    return dense


@functools.cache
def _pairs() -> np.ndarray:
    """Return the two float32 levels of every byte, the high half's first, as int64 of shape [256]."""
    byte = torch.arange(256, dtype=torch.uint8)
    levels = codebook("nf4").decode(torch.stack([byte >> 4, byte & 15], dim=1))
    return levels.numpy().view(np.int64).reshape(-1)


op.register_kernel("cpu")(nf4_dequantize)
