"""Grouped adapters.

One base model serves many adapters in one batch: row m of x belongs to adapter which[m], and

    y[m] = base[m] + s_g (x[m] A_g^T) B_g^T,  g = which[m];        y[m] = base[m] where which[m] is -1

Adapters differ in rank; none is padded to the largest.

    x        [M, K]
    base     [M, N]           what the frozen layer gave; somebody else still needs it
    which    int64 [M]        number of the adapter, or -1 for none
    lora_a   one [R_g, K] for each adapter
    lora_b   one [N, R_g] for each adapter
    scaling  one s_g for each adapter
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def grouped_lora(
    x: Tensor,
    base: Tensor,
    which: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float],
) -> Tensor:
    """Return y, float32 of shape [M, N]."""
    raise NotImplementedError
