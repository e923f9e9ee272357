"""PiSSA: start the adapter at the principal part of the weight, and freeze the rest.

    W = U S V^T;   B = U_r sqrt(S_r / s),   A = sqrt(S_r / s) V_r^T,   W <- W - s B A

With s B A = U_r S_r V_r^T the model is unchanged at the start, and training moves the directions in which W is
largest. Source: Meng, Wang and Zhang 2024 (arXiv 2404.02948), section 3; the fast variant uses the randomised SVD of
Halko, Martinsson and Tropp 2011.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

# W [N, K] in float32, rank, s -> A [R, K], B [N, R]
Split = Callable[[Tensor, int, float], tuple[Tensor, Tensor]]

FAST = re.compile(r"pissa_niter_(\d{1,9})")

# Halko and others need one or two, PEFT's examples take up to 16; each reads the weight twice
MOST_ITERATIONS = 100


def is_fast(name: str) -> bool:
    """Say whether this is "pissa_niter_N" with as many iterations as end in reasonable time."""
    fast = FAST.fullmatch(name)
    return fast is not None and int(fast.group(1)) <= MOST_ITERATIONS


def splitter(name: str) -> Split:
    """Return the split that an init_lora_weights of "pissa" or "pissa_niter_N" asks for."""
    fast = FAST.fullmatch(name)
    iterations = int(fast.group(1)) if fast else None

    def split(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
        if iterations is None:
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        else:
            # a weight smaller than the rank has no more singular values than its smaller side
            u, s, v = torch.svd_lowrank(weight, min(rank, *weight.shape), niter=iterations)
            vh = v.T
        root = (s[:rank] / scaling).sqrt()
        return root[:, None] * vh[:rank], u[:, :rank] * root

    return split
