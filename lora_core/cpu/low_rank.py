"""The steps of LoRA layers on the CPU, by the faster library's products; formulas of lora_core/reference/lora.py."""

import torch
from torch import Tensor

from lora_core.cpu.dropout import dropped
from lora_core.cpu.product import product, scaled_product
from lora_core.reference.dropout import Drop

# columns of x or dL/dy, by a few of S or dS: with 256 to 1408 of them MKL took 0.5 to 1.15 times what oneDNN took, with
# 4096 up to 1.8, where oneDNN is the faster library
MANY = 2048
# rows of dL/dy for each rank, from which on dB^T and a copy of it take less time than dB: 1.3 to 2 times less at 1024
# rows and 16 ranks, 4 times more at one row
TALL = 16


def runs_here(x: Tensor, lora_a: Tensor) -> bool:
    """Say whether these dtypes have a fast path: float32; in half precision PyTorch takes oneDNN by itself."""
    return x.dtype == lora_a.dtype == torch.float32


def shrink(x: Tensor, lora_a: Tensor, dropout: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """Return S = drop(x) A^T."""
    return product(dropped(x, dropout, seed), lora_a)


def expand(x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """Return y = x W^T + b + s S B^T."""
    return product(x, weight, bias).addmm_(hidden, lora_b.T, alpha=scaling)


def hidden_gradient(d_y: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """Return dS = s G B."""
    return scaled_product(d_y, lora_b.T, scaling)


def a_gradient(
    d_s: Tensor, x: Tensor, dropout: float = 0.0, seed: Tensor | None = None, drop: Drop = dropped
) -> Tensor:
    """Return dA = dS^T drop(x)."""
    return _rows_summed(d_s, drop(x, dropout, seed))


def b_gradient(d_y: Tensor, hidden: Tensor, scaling: float) -> Tensor:
    """Return dB = s G^T S; of many rows made as the transpose of s S^T G, whose few rows both libraries like better."""
    if d_y.shape[0] < TALL * hidden.shape[1]:
        return scaled_product(d_y.T, hidden.T, scaling, by_mkl=True)
    return _rows_summed(hidden, d_y, scaling).T.contiguous()


def _rows_summed(narrow: Tensor, wide: Tensor, factor: float = 1.0) -> Tensor:
    """Return factor narrow^T wide, narrow [M, R] and wide [M, C] in any strides."""
    return scaled_product(narrow.T, wide.T, factor, by_mkl=wide.shape[1] <= MANY)


def add_low_rank(
    d_x: Tensor,
    d_s: Tensor,
    lora_a: Tensor,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    drop: Drop = dropped,
) -> Tensor:
    """Add keep (dS A) / (1 - p) to d_x in place; return it."""
    return d_x.add_(drop(product(d_s, lora_a.T), dropout, seed)) if dropout else d_x.addmm_(d_s, lora_a)
