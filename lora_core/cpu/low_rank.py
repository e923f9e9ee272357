"""The steps of LoRA layers on the CPU, by the faster library's products; formulas of lora_core/reference/lora.py."""

import torch
from torch import Tensor

from lora_core.cpu.product import product
from lora_core.reference.dropout import dropout as drop

# columns of x or dL/dy: at 256 to 1408 of them MKL's product took 0.5 to 1.15 times what the other took, at 4096 up to
# 1.8
MANY = 2048


def runs_here(x: Tensor, lora_a: Tensor) -> bool:
    """Say whether these dtypes have a fast path: float32; in half precision PyTorch takes oneDNN by itself."""
    return x.dtype == lora_a.dtype == torch.float32


def shrink(x: Tensor, lora_a: Tensor, dropout: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """Return S = drop(x) A^T."""
    return product(drop(x, dropout, seed), lora_a)


def expand(x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """Return y = x W^T + b + s S B^T."""
    return product(x, weight, bias).addmm_(hidden, lora_b.T, alpha=scaling)


def hidden_gradient(d_y: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """Return dS = s G B."""
    return product(d_y, lora_b.T).mul_(scaling)


def a_gradient(d_s: Tensor, x: Tensor, dropout: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """Return dA = dS^T drop(x)."""
    return _rows_summed(drop(x, dropout, seed), d_s).T.contiguous()


def b_gradient(d_y: Tensor, hidden: Tensor, scaling: float) -> Tensor:
    """Return dB = s G^T S."""
    return _rows_summed(d_y, hidden).mul_(scaling).contiguous()


def _rows_summed(wide: Tensor, narrow: Tensor) -> Tensor:
    """Return wide^T narrow, in any strides.

    Of many columns made as the transpose of narrow^T wide, whose few rows oneDNN likes better.
    """
    return product(narrow.T, wide.T).T if wide.shape[1] > MANY else torch.mm(wide.T, narrow)


def add_low_rank(d_x: Tensor, d_s: Tensor, lora_a: Tensor, dropout: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """Add keep (dS A) / (1 - p) to d_x in place; return it."""
    return d_x.add_(drop(product(d_s, lora_a.T), dropout, seed)) if dropout else d_x.addmm_(d_s, lora_a)
