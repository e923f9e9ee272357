"""LoRA for a batch whose rows belong to different adapters, forward and backward, in plain PyTorch.

A_g [R_g, K] stand one below the other in A [R, K], B_g [N, R_g] side by side in B [N, R], R the sum of all ranks. For
row m of adapter g, with offset o_g:

    S_m = x_m A_g^T
    y_m = base_m + s_g S_m B_g^T          base_m alone where the row has no adapter

The rows of S have different lengths. They are stored one behind the other, sorted by adapter and, among rows of one, in
the order of the batch: each adapter's part is a matrix [its rows, R_g], and nothing is padded. How long they are
together depends on which rows have which adapter, which on a GPU the host does not know: the tensor that holds them has
the M max R_g elements that they need at most, zeros behind the last row, which nobody reads.

Backward, with G = dL/dy, row by row as for one adapter (lora.py), the sums over the rows of each adapter:

    dS_m = s_g G_m B_g      dx_m = dS_m A_g      dA_g = sum dS_m^T x_m      dB_g = s_g sum G_m^T S_m      dbase = G

Source: Chen et al. 2023 (Punica, arXiv 2310.18547) for the forward; the backward is the chain rule.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def offsets(ranks: Sequence[int]) -> list[int]:
    """Return where each adapter's rows of A begin, and the end."""
    found = [0]
    for rank in ranks:
        found.append(found[-1] + rank)
    return found


class Member(NamedTuple):
    """An adapter that has rows in a batch, and where what belongs to it lies.

    Args:
        adapter: which one.
        rows: of the batch sorted by adapter.
        part: rows of A, columns of B.
        stored: elements of S.
    """

    adapter: int
    rows: slice
    part: slice
    stored: slice

    def of(self, hidden: Tensor) -> Tensor:
        """Return this adapter's part of S or of dL/dS, [its rows, its rank]."""
        return hidden[self.stored].view(self.rows.stop - self.rows.start, self.part.stop - self.part.start)


def members(ranks: Sequence[int], adapter: Tensor) -> tuple[Tensor, list[Member]]:
    """Return the order that sorts rows by adapter, and the adapters that have rows."""
    starts, found, stored = offsets(ranks), [], 0
    order = adapter.argsort(stable=True)
    ends = torch.searchsorted(adapter[order], torch.arange(len(ranks) + 1, device=adapter.device)).tolist()
    for g, rank in enumerate(ranks):
        end = stored + (ends[g + 1] - ends[g]) * rank
        if ends[g] < ends[g + 1]:
            found.append(Member(g, slice(ends[g], ends[g + 1]), slice(starts[g], starts[g + 1]), slice(stored, end)))
        stored = end
    return order, found


def grouped_lora(
    x: Tensor,
    base: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    ranks: Sequence[int],
    adapter: Tensor,
    scaling: Tensor,
) -> Tensor:
    """Return base + s_g (x A_g^T) B_g^T row by row, as one would write it on a board.

    Args:
        x: shape [..., K].
        base: shape [..., N], or None for zeros.
        adapter: int64, the shape of x without its last dimension.
        lora_a, lora_b, ranks, scaling: as in forward.
    Returns:
        Shape [..., N], dtype of x.
    """
    low = x.to(lora_a.dtype)
    y = low.new_zeros(*x.shape[:-1], len(lora_b)) if base is None else base.to(lora_a.dtype)
    for g, (a_g, b_g) in enumerate(zip(lora_a.split(list(ranks)), lora_b.split(list(ranks), 1), strict=True)):
        y = y + torch.where((adapter == g).unsqueeze(-1), scaling[g] * (low @ a_g.T @ b_g.T), 0)
    return y.to(x.dtype)


def shrink(x: Tensor, lora_a: Tensor, ranks: Sequence[int], adapter: Tensor) -> Tensor:
    """Return S as forward stores it, in operations that have a derivative; operands as there."""
    order, found = members(ranks, adapter)
    rows = x[order].to(lora_a.dtype)
    parts = [(rows[member.rows] @ lora_a[member.part].T).flatten() for member in found]
    rest = len(x) * max(ranks, default=0) - sum(map(len, parts))
    return torch.cat([*parts, rows.new_zeros(rest)])


def forward(
    x: Tensor,
    base: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    ranks: Sequence[int],
    adapter: Tensor,
    scaling: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return (y [M, N], S [M max rank], as stored) for x [M, K].

    Args:
        x: shape [M, K].
        base: shape [M, N], or None for zeros.
        lora_a: shape [sum of ranks, K].
        lora_b: shape [N, sum of ranks].
        ranks: one for each adapter.
        adapter: int64 [M], the adapter of each row; one that does not exist, such as -1, means none.
        scaling: float32, one element for each adapter.
    """
    low, factors = lora_a.dtype, scaling.tolist()
    order, found = members(ranks, adapter)
    rows_of_x = x[order].to(low)
    y = x.new_zeros(len(x), len(lora_b), dtype=low) if base is None else base[order].to(low)
    hidden = x.new_zeros(len(x) * max(ranks, default=0), dtype=low)
    for member in found:
        s, rows = member.of(hidden), member.rows
        torch.mm(rows_of_x[rows], lora_a[member.part].T, out=s)
        y[rows].addmm_(s, lora_b[:, member.part].T, alpha=factors[member.adapter])
    return y[order.argsort()].to(x.dtype), hidden


def backward(
    d_y: Tensor,
    x: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    ranks: Sequence[int],
    adapter: Tensor,
    scaling: Tensor,
    hidden: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients (d_x, d_lora_a, d_lora_b) that needs asks for, None for the others; operands as above."""
    need_x, need_a, need_b = needs
    low, factors = d_y.to(lora_a.dtype), scaling.tolist()
    order, found = members(ranks, adapter)
    grad = low[order]
    rows_of_x = None if x is None else x[order].to(low.dtype)
    d_x = low.new_zeros(len(low), lora_a.shape[1]) if need_x else None
    d_lora_a = low.new_zeros(lora_a.shape) if need_a else None
    d_lora_b = low.new_zeros(lora_b.shape) if need_b else None
    for member in found:
        rows, part, factor = member.rows, member.part, factors[member.adapter]
        d_s = factor * (grad[rows] @ lora_b[:, part])
        if d_x is not None:
            d_x[rows] = d_s @ lora_a[part]
        if d_lora_a is not None and rows_of_x is not None:
            d_lora_a[part] = d_s.T @ rows_of_x[rows]
        if d_lora_b is not None:
            d_lora_b[:, part] = factor * (grad[rows].T @ member.of(hidden))
    return None if d_x is None else d_x[order.argsort()].to(d_y.dtype), d_lora_a, d_lora_b
