"""A solution of docs/puzzles/13-speed-gate.py."""

import triton
import triton.language as tl

from lora_core.kernels.tile import round_to  # float32 tile, dtype -> the tile rounded to the nearest

WORDS = 1024  # of a program
WARPS = 4  # of a program


@triton.jit
def dequantize_kernel(words_ptr, absmax_ptr, levels_ptr, w_ptr, words, BLOCK_SIZE: tl.constexpr, WORDS: tl.constexpr):
    """Write w, WORDS words a program."""
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    # a bound known to be a multiple of 8 lets four words be loaded at once
    ok = word < words // 8 * 8
    packed = tl.load(words_ptr + word, mask=ok, other=0)
    scale = tl.load(absmax_ptr + word // (BLOCK_SIZE // 8), mask=ok, other=0.0)
    element = tl.arange(0, 8)
    code = (packed[:, None] >> (element ^ 1)[None, :] * 4) & 15
    table = tl.load(levels_ptr + tl.arange(0, 16))
    level = tl.gather(table, code.reshape(8 * WORDS), 0).reshape(WORDS, 8)
    w = round_to(level * scale[:, None], tl.bfloat16)
    tl.store(w_ptr + word[:, None] * 8 + element[None, :], w, mask=ok[:, None] & (element < 8)[None, :])
