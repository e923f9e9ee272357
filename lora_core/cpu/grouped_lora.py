"""lora_core::grouped_lora on the CPU: few rows by one product with all adapters, of which each row keeps its own.

For G adapters that is up to G times the work, and two products instead of 2 G: what a call costs is more than what a
small product does. Where the work is too large, the reference goes from adapter to adapter. The formulas are those of
lora_core/reference/grouped.py.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.cpu.low_rank import runs_here
from lora_core.ops.eager import register
from lora_core.ops.grouped_lora import backward_op, op
from lora_core.reference import grouped as reference

# multiplications for which the calls for one adapter leave time, on two cores of an AMD EPYC
OF_AN_ADAPTER = 2_000_000


def grouped_lora(
    x: Tensor,
    base: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    ranks: Sequence[int],
    adapter: Tensor,
    scaling: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return what the reference returns, up to rounding."""
    if _pays(x, lora_a, lora_b, ranks):
        of_rank, own = _own(ranks, adapter)
        every = F.linear(x, lora_a)
        scaled = torch.where(own, every * scaling[of_rank], 0)
        y = scaled @ lora_b.T if base is None else torch.addmm(base, scaled, lora_b.T)
        if _is_finite(y):
            return y, _stored(every, own, adapter, ranks)
    return reference.forward(x, base, lora_a, lora_b, ranks, adapter, scaling)


def grouped_lora_backward(
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
    """Return what the reference returns, up to rounding."""
    need_x, need_a, need_b = needs
    if _pays(d_y, lora_a, lora_b, ranks):
        of_rank, own = _own(ranks, adapter)
        factors = scaling[of_rank]
        d_x = d_lora_a = d_lora_b = None
        if need_x or need_a:
            d_s = torch.where(own, d_y @ lora_b * factors, 0)
            d_x = d_s @ lora_a if need_x else None
            d_lora_a = d_s.T @ x if need_a and x is not None else None
        if need_b:
            d_lora_b = d_y.T @ torch.where(own, _unstored(hidden, own, adapter) * factors, 0)
        if all(g is None or _is_finite(g) for g in (d_x, d_lora_a, d_lora_b)):
            return d_x, d_lora_a, d_lora_b
    return reference.backward(d_y, x, lora_a, lora_b, ranks, adapter, scaling, hidden, needs)


def _pays(rows: Tensor, lora_a: Tensor, lora_b: Tensor, ranks: Sequence[int]) -> bool:
    """Say whether one product with all adapters takes less than a product with each."""
    sides = lora_a.shape[1] + lora_b.shape[0]
    return runs_here(rows, lora_a) and len(rows) * len(lora_a) * sides <= min(len(rows), len(ranks)) * OF_AN_ADAPTER


def _own(ranks: Sequence[int], adapter: Tensor) -> tuple[Tensor, Tensor]:
    """Return the adapter of each rank, [sum of ranks], and which ranks are those of a row's adapter, [M, same]."""
    of_rank = _of_rank(tuple(ranks))
    return of_rank, adapter[:, None] == of_rank


@functools.lru_cache(maxsize=64)
def _of_rank(ranks: tuple[int, ...]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks, dtype=torch.int64))


def _stored(every: Tensor, own: Tensor, adapter: Tensor, ranks: Sequence[int]) -> Tensor:
    """Return S as the reference stores it, of x with every adapter's A."""
    order = adapter.argsort(stable=True)
    kept = every[order].masked_select(own[order])
    return F.pad(kept, (0, len(every) * max(ranks, default=0) - len(kept)))


def _unstored(hidden: Tensor, own: Tensor, adapter: Tensor) -> Tensor:
    """Return S with a column for every rank, zero where a row's adapter has none."""
    order = adapter.argsort(stable=True)
    by_adapter = hidden.new_zeros(own.shape).masked_scatter_(own[order], hidden)
    return torch.empty_like(by_adapter).index_copy_(0, order, by_adapter)


def _is_finite(t: Tensor) -> bool:
    """Say whether a result is finite, as it is where no adapter is infinite or NaN; one that is must not reach others.

    By the sum, which may overflow where nothing else does: then the reference says the same.
    """
    return bool(t.sum().isfinite())


register(op, "cpu", grouped_lora)
register(backward_op, "cpu", grouped_lora_backward)
