"""The seed of a counter-based dropout mask, drawn once a forward."""

import torch
from torch import Tensor

# the mask's hash takes 31 bits
SEED_LIMIT = 2**31


def fresh_seed(device: torch.device) -> Tensor:
    """Return a random seed, int64 of shape [1], drawn from PyTorch's generator on that device.

    Drawing from the global generator makes torch.manual_seed reproduce a run, and activation checkpointing, which
    restores the generator before it recomputes, repeat the mask.
    """
    return torch.randint(SEED_LIMIT, (1,), dtype=torch.int64, device=device)
