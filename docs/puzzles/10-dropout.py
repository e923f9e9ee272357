"""Counter-based dropout.

    y[m, n] = factor * x[m, n] where kept, else 0        factor = 1 / (1 - p)
    kept[m, n]:  mix(mix(seed ^ mix(m)) ^ n) >= threshold        threshold = p 2^32

Whether an element is kept is a hash of its place. Nothing is stored for the backward, which computes the hash again;
and the mask is the same in any tiling. Program (i, j) does rows i BLOCK_M ... and columns j BLOCK_N ...

    x_ptr, y_ptr  float32 [M, N], row after row
    seed          a number; take it as seed.to(tl.uint32)
    threshold     a number, which may pass 2^31: take it as threshold.to(tl.uint32)

All of the hash is uint32.
"""

import triton
import triton.language as tl

from lora_core.kernels.tile import mix  # uint32 to uint32, elementwise


@triton.jit
def dropout_kernel(x_ptr, y_ptr, seed, M, N, threshold, factor, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Write a tile of y."""
    pass
