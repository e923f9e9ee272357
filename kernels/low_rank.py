"""The low-rank path around a frozen weight, by kernels of this library ("fused") or by the library's matrix products.

    S = drop(x) A^T        y = x W^T + s S B^T + b        dS = s G B        dB = s G^T S        dA = dS^T drop(x)

"fused": one product whose accumulator starts with the low-rank part and the bias (low_rank_matmul.py), and skinny
products of a kernel each (shrink.py, row_sum.py). "library": the library multiplies wherever no mask and no second
dtype is in the way. Its product x W^T is added to the low-rank part and the bias that are in y already, which its
epilogue reads while it multiplies; adding the low-rank part afterwards would read and write y once more.

Reference: lora_core/reference/lora.py
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.kernels import row_sum
from lora_core.kernels.crossover import device_name, faster_path
from lora_core.kernels.log import log, log_launch
from lora_core.kernels.low_rank_matmul import launch_low_rank_matmul
from lora_core.kernels.row_sum import launch_row_sum
from lora_core.kernels.shrink import launch_shrink
from lora_core.ops.scaled import scaled

# bytes a part of a float32 sum moves: written once and read once
PART_BYTES = 8


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    lora_b: Tensor,
    factor: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    path: str | None = None,
    total: Tensor | None = None,
) -> Tensor:
    """Return x W^T + factor keep (S B^T) + b by the faster path; x [M, K], W [N, K], S [M, R], B [N, R].

    Args:
        x, weight, bias, hidden, lora_b, factor, dropout, seed: as in launch_low_rank_matmul.
        path: "fused" or "library"; by default what was measured to be faster.
        total: dtype of x, shape [M, N], to be added to in place and returned; or None.
    """
    (m, k), n, r = x.shape, weight.shape[0], lora_b.shape[1]
    path = path or path_of(x, weight.shape, r)
    log.debug("linear %s m=%d n=%d k=%d r=%d: %s", x.dtype, m, n, k, r, path)
    if path == "fused":
        return launch_low_rank_matmul(x, weight, bias, hidden, lora_b, factor, dropout, seed, total, total is not None)
    if r == 0 and total is None:
        return F.linear(x, weight, bias)
    return low_rank_part(x, n, bias, hidden, lora_b, factor, dropout, seed, total).addmm_(x, weight.T)


def path_of(x: Tensor, shape: Sequence[int], rank: int) -> str:
    """Return the path that was measured to be faster for x [M, K], W of this shape [N, K] and this rank."""
    return faster_path(device_name(x.device), x.dtype, len(x), *shape, rank)


def low_rank_part(
    x: Tensor,
    columns: int,
    bias: Tensor | None,
    hidden: Tensor,
    lora_b: Tensor,
    factor: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    total: Tensor | None = None,
) -> Tensor:
    """Return factor keep (S B^T) + b, [M, columns] in the dtype of x: what a product x W^T is then added to.

    Args:
        x: for its dtype and number of rows.
        bias, hidden, lora_b, factor, dropout, seed: as in launch_low_rank_matmul.
        total: as in low_rank_linear.
    """
    if total is not None and bias is None and lora_b.shape[1] == 0:
        return total
    if bias is None and _library_can(x, lora_b, dropout):
        return scaled(hidden, lora_b, factor) if total is None else total.addmm_(hidden, lora_b.T, alpha=factor)
    # no terms of x W^T
    x, weight = x[:, :0], x.new_empty(columns, 0)
    return launch_low_rank_matmul(x, weight, bias, hidden, lora_b, factor, dropout, seed, total, total is not None)


def skinny_product(
    x: Tensor,
    lora_a: Tensor,
    path: str,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    factor: float = 1.0,
) -> Tensor:
    """Return factor drop(x) A^T by this path, where it can: S [M, R] of x [M, K] and A [R, K].

    Args:
        x, lora_a, dropout, seed, factor: as in launch_shrink.
    """
    if path == "library" and _library_can(x, lora_a, dropout):
        return scaled(x, lora_a, factor)
    return launch_shrink(x, lora_a, dropout, seed, factor)


def _library_can(x: Tensor, other: Tensor, dropout: float = 0.0) -> bool:
    """Say whether no mask and no second dtype is in the way of a product."""
    return not dropout and x.dtype == other.dtype


def low_rank_gradients(
    d_y: Tensor,
    x: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    hidden: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    needs: Sequence[bool],
    path: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return (dS, d_bias, dA, dB), of what needs = (x, bias, lora_a, lora_b) asks for; None for the others.

    dS is there if x or lora_a needs it. Operands as in reference.lora.backward; path as in skinny_product.
    """
    need_x, need_bias, need_a, need_b = needs
    need_s = need_x or need_a
    d_s = d_bias = d_lora_a = d_lora_b = None
    by_library = path == "library" and _library_can(d_y, lora_b)
    # parts of dS for each block of columns move 8 R bytes a block and row; a second read of G its own size
    columns, ranks = row_sum.BLOCK_C[lora_b.dtype], lora_b.shape[1]
    together = (
        not by_library
        and need_s
        and ranks <= row_sum.BLOCK_R[lora_b.dtype][0]
        and PART_BYTES * ranks < columns * d_y.element_size()
    )
    log_launch("gradients of A and B", "one read of dy" if together and need_b else "a read of dy each", hidden)
    if need_b and by_library:
        d_lora_b = scaled(d_y.T, hidden.T, scaling)
    elif need_b:
        shrink_by = lora_b if together else None
        d_lora_b, d_bias, d_s = launch_row_sum(d_y, hidden, scaling, shrink_by=shrink_by, bias=need_bias)
    if need_bias and d_bias is None:
        d_bias = d_y.sum(0)
    if need_s and d_s is None:
        d_s = skinny_product(d_y, lora_b.T, path, factor=scaling)
    if need_a and x is not None and d_s is not None:
        d_lora_a = a_gradient(x, d_s, path, dropout, seed)
    return d_s, d_bias, d_lora_a, d_lora_b


def a_gradient(x: Tensor, d_s: Tensor, path: str, dropout: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """Return dS^T drop(x) by this path, where it can: [R, K] of dS [M, R] and x [M, K]."""
    if path == "library" and _library_can(x, d_s, dropout):
        return torch.mm(d_s.T, x)
    return launch_row_sum(x, d_s, 1.0, dropout, seed, transposed=True).product
