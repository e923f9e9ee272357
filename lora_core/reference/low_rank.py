"""The nearest matrix of a given rank, and how much of a matrix it keeps.

With M = U diag(s) V^T, s sorted downwards, the matrix of rank r nearest to M is made of its first r terms,

    M_r = sum_{i <= r} s_i u_i v_i^T

and what it misses is what the discarded singular values hold:

    |M - M_r|_F = sqrt(sum_{i > r} s_i^2)        |M - M_r|_2 = s_{r+1}

No matrix of rank r comes nearer, in either norm.

Source: Eckart and Young 1936; Mirsky 1960.
"""

import torch
from torch import Tensor

from lora_core.errors import ConfigError, ShapeError


def nearest_of_rank(matrix: Tensor, rank: int) -> Tensor:
    """Return M_r, the matrix of at most this rank nearest to M.

    Args:
        matrix: M, float32 or float64 of shape [M, N].
        rank: r, from 0; from min(M, N) on M itself comes back, up to rounding.
    Returns:
        Same dtype and shape as matrix.
    Raises:
        ShapeError: if matrix has not two dimensions.
        ConfigError: if rank is negative.
    Source: Eckart and Young 1936.
    """
    if matrix.dim() != 2:
        raise ShapeError(f"nearest_of_rank: want a matrix [M, N]; got shape {tuple(matrix.shape)}")
    if rank < 0:
        raise ConfigError(f"nearest_of_rank: rank is {rank}; want 0 or more")
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def energy(singular_values: Tensor) -> Tensor:
    """Return, for each rank from 0, the share of |M|_F^2 that M_r holds: sum_{i <= r} s_i^2 / sum s_i^2.

    Args:
        singular_values: s, sorted downwards, shape [n].
    Returns:
        float64 of shape [n + 1], from 0 to 1; ones throughout for a matrix of zeros, which rank 0 holds.
    """
    squares = singular_values.double().square()
    total = squares.sum()
    if total == 0:
        return torch.ones(len(squares) + 1, dtype=torch.float64)
    return torch.cat([squares.new_zeros(1), squares.cumsum(0) / total])


def rank_for_energy(singular_values: Tensor, share: float) -> int:
    """Return the smallest rank that holds this share of |M|_F^2.

    Args:
        singular_values: s, sorted downwards, shape [n].
        share: in [0, 1].
    Raises:
        ConfigError: if share is outside.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"rank_for_energy: share is {share}; want a number in [0, 1]")
    held = energy(singular_values)
    # the last sum may round to just below the whole
    return int((held < min(share, float(held[-1]))).sum())


def truncation_error(singular_values: Tensor, rank: int) -> float:
    """Return |M - M_r|_F from the singular values alone.

    Args:
        singular_values: s, sorted downwards, shape [n].
        rank: r, from 0.
    """
    return float(singular_values[rank:].double().norm())


def stored_numbers(rows: int, columns: int, rank: int) -> int:
    """Return how many numbers M_r is stored in as u_i, v_i and s_i: r (M + N + 1)."""
    return rank * (rows + columns + 1)
