"""How many programs fill a device: what decides how far a sum is split."""

import functools

import torch


@functools.cache
def processors(device: torch.device) -> int:
    """Return the number of a GPU's multiprocessors; for the interpreter, which runs one program at a time, 4."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def splits_to_fill(device: torch.device, tiles: int, length: int, shortest: int) -> int:
    """Return in how many parts to cut a sum so that there are programs for every multiprocessor.

    Depends on shapes and device alone, so that a result is the same in every run.

    Args:
        device: where the kernel runs.
        tiles: programs without any split.
        length: terms of the sum.
        shortest: terms of a part at least.
    """
    wanted = -(-processors(device) // max(tiles, 1))
    return max(1, min(wanted, length // shortest))
