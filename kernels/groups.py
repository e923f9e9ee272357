"""Rows of a batch sorted by adapter on the device, in tiles of one adapter each: what the gathering kernels share.

A tile holds rows of one adapter, and a row of S has as many elements as its adapter has ranks (reference/grouped.py),
so that products and what they read and write follow each adapter's own rank; nothing waits for the host but the first
call with a new tuple of ranks, whose tables are copied to the device. Rows without an adapter form a last group of
rank 0.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.tables import copied
from lora_core.kernels.variant import TYPES
from lora_core.reference import grouped as reference

# rows of a tile; columns of a step or a tile, and ranks of a program, by A's dtype
BLOCK_M = 16
BLOCK_C = {torch.float32: 64, torch.float16: 128, torch.bfloat16: 128}
BLOCK_R = {torch.float32: (16,), torch.float16: (16, 64), torch.bfloat16: (16, 64)}
WARPS = 4
STAGES = 2
# tables of ranks that are kept on devices
KEPT = 512
# adapters that a search looks at in a step: how many there are is no part of what is compiled
SEARCHED = tl.constexpr(64)


class Groups(NamedTuple):
    """Which rows belong to which adapter, on the device.

    Args:
        order: int64 [M], the rows sorted by adapter.
        starts: int64 [G + 2], where each group begins in order; group G has no adapter.
        tile_ends: int64 [G + 1], how many tiles there are up to each group's end.
        s_ends: int64 [G + 1], how many elements of S there are up to each group's end.
        tiles: at most this many tiles there are.
    """

    order: Tensor
    starts: Tensor
    tile_ends: Tensor
    s_ends: Tensor
    tiles: int


def groups(adapter: Tensor, ranks: Sequence[int]) -> Groups:
    """Sort rows by adapter, for adapters of these ranks; nothing here waits for the device."""
    rows, count = len(adapter), len(ranks)
    key = torch.where((adapter < 0) | (adapter >= count), count, adapter)
    key, order = key.sort(stable=True)
    starts = torch.searchsorted(key, torch.arange(count + 2, device=adapter.device))
    of_group = starts.diff()
    tile_ends = ((of_group + BLOCK_M - 1) // BLOCK_M).cumsum(0)
    s_ends = (of_group * rank_widths(tuple(ranks), adapter.device)).cumsum(0)
    return Groups(order, starts, tile_ends, s_ends, min(rows, triton.cdiv(rows, BLOCK_M) + count + 1))


def rank_offsets(ranks: tuple[int, ...], device: torch.device) -> Tensor:
    """Return int64 [G + 2]: where each adapter's ranks begin; group G has none."""
    return _kept(_offsets_and_widths, ranks, device)[0]


def rank_widths(ranks: tuple[int, ...], device: torch.device) -> Tensor:
    """Return int64 [G + 1]: how many ranks each adapter has, and group G."""
    return _kept(_offsets_and_widths, ranks, device)[1]


def rank_chunks(ranks: tuple[int, ...], block_r: int, device: torch.device) -> Tensor:
    """Return int64 [chunks, 2]: adapter and first rank of every block of ranks."""
    return _kept(_chunks, ranks, device, block_r)[0]


# copied to the device: other streams may read them
@functools.lru_cache(maxsize=KEPT)
def _offsets_and_widths(ranks: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
    starts = reference.offsets(ranks)
    rows = [*starts, starts[-1]], [*ranks, 0]
    return tuple(copied(torch.tensor(row, dtype=torch.int64, device="cpu"), device) for row in rows)


@functools.lru_cache(maxsize=KEPT)
def _chunks(ranks: tuple[int, ...], device: torch.device, block_r: int) -> tuple[Tensor, ...]:
    found = [(g, first) for g, rank in enumerate(ranks) for first in range(0, rank, block_r)]
    return (copied(torch.tensor(found, dtype=torch.int64, device="cpu").reshape(-1, 2), device),)


# what a captured graph reads at every replay must outlive the caches
_of_graphs: dict[tuple[Any, ...], tuple[Tensor, ...]] = {}


def _kept(
    make: Callable[..., tuple[Tensor, ...]], ranks: tuple[int, ...], device: torch.device, *more: int
) -> tuple[Tensor, ...]:
    key = (make, ranks, device, *more)
    tables = _of_graphs.get(key)
    if tables is None:
        tables = make(ranks, device, *more)
        if _capturing(device):
            _of_graphs[key] = tables
    return tables


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@triton.jit
def tile_of_group(order_ptr, starts_ptr, tile_ends_ptr, s_ends_ptr, offsets_ptr, G, BLOCK_M: tl.constexpr):
    """Group, rows, whether there are such, where theirs of S begin, first rank and number of ranks of a tile."""
    tile = tl.program_id(0)
    # adapters whose tiles all come before; behind them are the rows without an adapter, and tiles without rows
    before = tl.zeros((SEARCHED,), tl.int32)
    for start in tl.range(0, G, SEARCHED, num_stages=1):
        each = start + tl.arange(0, SEARCHED)
        ends = tl.load(tile_ends_ptr + each, mask=each < G, other=0)
        before += ((ends <= tile) & (each < G)).to(tl.int32)
    group = tl.sum(before)
    tiles_before = begin_of_group(tile_ends_ptr, group)
    of_group = (tile - tiles_before) * BLOCK_M + tl.arange(0, BLOCK_M)
    place = tl.load(starts_ptr + group) + of_group
    ok = place < tl.load(starts_ptr + group + 1)
    row = tl.load(order_ptr + place, mask=ok, other=0)
    offset = tl.load(offsets_ptr + group)
    ranks = tl.load(offsets_ptr + group + 1) - offset
    stored = begin_of_group(s_ends_ptr, group) + of_group * ranks
    return group, row, ok, stored, offset, ranks.to(tl.int32)


@triton.jit
def begin_of_group(ends_ptr, group):
    """Where a group begins, by where each ends."""
    return tl.load(ends_ptr + group - 1, mask=group > 0, other=0)


def options(stages: int = STAGES, warps: int = WARPS) -> dict[str, Any]:
    """Return how a gathering kernel is launched."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def types(dtype: torch.dtype, low: torch.dtype) -> dict[str, str]:
    """Return Triton's types of a gathering kernel's pointers, whose names all have one meaning.

    Args:
        dtype: of x, y and dL/dy.
        low: of A, B and S.
    """
    return {
        **dict.fromkeys(("x_ptr", "base_ptr", "y_ptr", "d_ptr"), f"*{TYPES[dtype]}"),
        **dict.fromkeys(("p_ptr", "add_ptr", "s_ptr", "t_ptr", "out_ptr"), f"*{TYPES[low]}"),
        **dict.fromkeys(
            ("order_ptr", "starts_ptr", "tile_ends_ptr", "s_ends_ptr", "offsets_ptr", "chunks_ptr"), "*i64"
        ),
    }
