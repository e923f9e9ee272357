"""OLoRA: start the adapter at the first columns of the weight's QR decomposition.

    W = Q R;   B = Q[:, :r],   A = R[:r],   W <- W - s B A

B has orthonormal columns, which span the first r columns of W, so that B A = B B^T W. With s above 1 more of that is
taken out than was there, as in PEFT. Source: Büyükakyüz 2024 (arXiv 2406.01775), section 3.
"""

import torch
from torch import Tensor


def split(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return A [R, K] and B [N, R] of a weight [N, K]; scaling does not enter, as in PEFT."""
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]
