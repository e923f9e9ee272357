"""A solution of docs/puzzles/05-nested-absmax.py."""

from torch import Tensor


def decode_absmax(codes: Tensor, absmax2: Tensor, offset: Tensor, levels: Tensor, block_size: int) -> Tensor:
    """Return absmax, float32 of shape [n]."""
    return levels[codes.long()] * absmax2.repeat_interleave(block_size)[: codes.numel()] + offset
