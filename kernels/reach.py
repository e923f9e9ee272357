"""What the kernels leave to the reference: float64, and sizes and strides that 32 bits do not hold with ease.

Triton compiles a kernel anew for every set of arguments that take 64 bits. From 2^30 on sizes and strides are taken by
none, which leaves room to step past an end; how many elements there are, and where they lie, is counted in 64 bits.
"""

import torch
from torch import Tensor

from lora_core.kernels.crossover import log_launch

# a size or stride of an operand at most
LARGEST = 2**30 - 1


def left_to_reference(operation: str, *operands: Tensor | None) -> bool:
    """Say whether the reference has to take an operation, and say at level DEBUG why.

    Args:
        operation: its name.
        operands: the first for its dtype; all for sizes and strides, with leading dimensions flattened.
    """
    first = operands[0]
    if first is not None and first.dtype == torch.float64:
        why = "float64"
    elif any(t is not None and max((*t.shape, *t.stride())) > LARGEST for t in operands):
        why = "a size or stride of 2^30 or more"
    else:
        return False
    log_launch(operation, f"{why}, reference")
    return True
