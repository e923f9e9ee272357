"""What the operations are tried on: a few small operands, the same on every device."""

from typing import NamedTuple

import torch
from torch import Tensor

SCALING, SEED = 0.5, 77


class Case(NamedTuple):
    """Operands: their dtype, x [M, K], W [N, K], A [R, K], the dropout before A, and A's and B's dtype if another."""

    dtype: torch.dtype
    m: int
    n: int
    k: int
    r: int
    dropout: float = 0.0
    low: torch.dtype | None = None


CASES = (
    # odd on purpose: blocks straddle rows and the last is short
    Case(torch.float32, 5, 33, 70, 3),
    # as models have them, whole tiles in half precision: a few tokens, and many, which drop some of x
    Case(torch.bfloat16, 16, 64, 256, 16),
    Case(torch.bfloat16, 80, 64, 256, 16, 0.25),
    # as adapters are trained over a base in half precision
    Case(torch.float16, 16, 64, 256, 16, low=torch.float32),
)


class Operands(NamedTuple):
    """Of a linear layer with its low-rank path; the mask is a dropout and its seed."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    a: Tensor
    b: Tensor
    mask: tuple[float, Tensor]


def operands(device: str, case: Case) -> Operands:
    """Return the operands of a case, the same on every device."""
    g = torch.Generator().manual_seed(0)
    dtype, m, n, k, r, dropout, low = case
    made = (torch.randn(shape, generator=g) for shape in ((m, k), (n, k), (n,), (r, k), (n, r)))
    dtypes = (dtype, dtype, dtype, low or dtype, low or dtype)
    x, weight, bias, a, b = (t.to(device, d) for t, d in zip(made, dtypes, strict=True))
    return Operands(x, weight, bias, a, b, (dropout, torch.tensor([SEED], device=device)))
