"""NF4 dequantise, as a kernel.

    w[i] = levels[code[i]] * absmax[i // BLOCK_SIZE],  i < n

    packed_ptr  uint8 [(n + 1) // 2]: code 2 i in the high half of byte i, code 2 i + 1 in its low half
    absmax_ptr  float32 [ceil(n / BLOCK_SIZE)]
    levels_ptr  float32 [16]
    w_ptr       float32 [n]
    BLOCK_SIZE  weights that share one scale
    BLOCK       weights of a program; the kernel is started ceil(n / BLOCK) times, not always with the same BLOCK

tl.load takes pointers that repeat: two weights may read the same byte. What is loaded as uint8 is shifted and masked
more safely after .to(tl.int32).
"""

import triton
import triton.language as tl


@triton.jit
def dequantize_kernel(packed_ptr, absmax_ptr, levels_ptr, w_ptr, n, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Write w, BLOCK weights a program."""
    pass
