"""NF4 dequantise under a budget of instructions.

Exercise 7 again, to bfloat16 and with a budget: 7 machine instructions a weight on sm_90, counted in the compiled code,
for which no GPU is needed. Byte by byte takes 8 and more. It pays to read 32-bit words of eight codes, so that each
weight has an eighth of a load and of the arithmetic around it.

    words_ptr   int32 [words]: eight codes each. The lowest byte comes first, in a byte the high half
    absmax_ptr  float32, a scale for BLOCK_SIZE weights; no word straddles a block
    levels_ptr  float32 [16]
    w_ptr       bfloat16 [8 words]
    words       how many there are: a multiple of 8

WORDS is yours to choose, a power of two, and so is WARPS. The kernel is started ceil(words / WORDS) times.
tl.gather(table, index, 0) looks up in a tile instead of in memory; reshape makes [WORDS, 8] one-dimensional and back.
round_to(tile, tl.bfloat16) rounds as a GPU does, in the interpreter too.
"""

import triton
import triton.language as tl

from lora_core.kernels.tile import round_to  # float32 tile, dtype -> the tile rounded to the nearest

WORDS = 1024  # of a program
WARPS = 4  # of a program


@triton.jit
def dequantize_kernel(words_ptr, absmax_ptr, levels_ptr, w_ptr, words, BLOCK_SIZE: tl.constexpr, WORDS: tl.constexpr):
    """Write w, WORDS words a program."""
    pass
