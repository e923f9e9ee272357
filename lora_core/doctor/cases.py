"""What the operations are tried on: a few small operands, the same on every device."""

from typing import NamedTuple

import torch
from torch import Tensor

SCALING, SEED = 0.5, 77


class Case(NamedTuple):
    """Operands: their dtype, x [M, K], W [N, K], A [R, K], and the dropout before A."""

    dtype: torch.dtype
    m: int
    n: int
    k: int
    r: int
    dropout: float = 0.0


CASES = (
    # odd on purpose: blocks straddle rows and the last is short
    Case(torch.float32, 5, 33, 70, 3),
    # as models have them, whole tiles in half precision: a few tokens, and many, which drop some of x
    Case(torch.bfloat16, 16, 64, 256, 16),
    Case(torch.bfloat16, 80, 64, 256, 16, 0.25),
)


class Operands(NamedTuple):
    """Of a linear layer with its low-rank path."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    a: Tensor
    b: Tensor


def operands(device: str, case: Case) -> Operands:
    """Return the operands of a case, the same on every device."""
    g = torch.Generator().manual_seed(0)
    _, m, n, k, r, _ = case
    shapes = ((m, k), (n, k), (n,), (r, k), (n, r))
    return Operands(*(torch.randn(shape, generator=g).to(device, case.dtype) for shape in shapes))


def mask_of(device: str, case: Case) -> tuple[float, Tensor]:
    """Return the dropout and its seed."""
    return case.dropout, torch.tensor([SEED], device=device)
