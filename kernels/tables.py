"""Codebooks and other constants on the device that a kernel reads them from, copied there once.

Made on the CPU in dtypes that are named: what is made once must not depend on the defaults in force at the first call.
"""

import functools
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from lora_core.quant.codebook import codebook


def copied(table: Tensor, device: torch.device) -> Tensor:
    """Return a table's copy on the device, to be kept: what is in force in the calling thread has no part in it.

    While torch.compile prepares a CUDA graph (mode="reduce-overhead"), what that thread allocates is the graph's: a
    table would be refused, or lie where the next replay writes. So a thread of its own copies, and waits for the copy.
    """
    with ThreadPoolExecutor(1) as other:
        return other.submit(table.to, device).result()


@functools.cache
def levels(name: str, device: torch.device) -> Tensor:
    """Return a codebook's levels: float32 [16] or [256] on the device."""
    return copied(codebook(name).levels, device)


@functools.cache
def _no_seed(device: torch.device) -> Tensor:
    return copied(torch.zeros(1, dtype=torch.int64, device="cpu"), device)


def seed_or_none(seed: Tensor | None, dropout: float, device: torch.device) -> Tensor:
    """Return what a kernel is given for a seed: without dropout a constant, int64 of one element too."""
    return seed if seed is not None and dropout else _no_seed(device)


@functools.cache
def thresholds(name: str, device: torch.device) -> Tensor:
    """Return what separates a codebook's levels as a binary search tree: float32 [levels], node 1 the root.

    Code c is the number of thresholds that a value is not below. Node k's children are 2k and 2k + 1; node 0 is unused.
    The levels must rise with their codes.
    """
    book = codebook(name)
    middle = book.midpoints.double()
    nearest = middle.float()
    # a value half-way goes down, or, for ties to even, to the even one of codes i and i + 1
    code = torch.arange(len(middle), device="cpu")
    goes_up = (code % 2 == 1) & book.ties_to_even
    exact = nearest.double() == middle
    reached = (nearest.double() > middle) | (exact & goes_up)
    ordered = torch.where(reached, nearest, torch.nextafter(nearest, torch.full_like(nearest, float("inf"))))
    count = len(ordered) + 1
    tree = torch.zeros(count, dtype=torch.float32, device="cpu")
    for node in range(1, count):
        depth = node.bit_length() - 1
        width = count >> (depth + 1)
        tree[node] = ordered[(2 * (node - (1 << depth)) + 1) * width - 1]
    return copied(tree, device)
