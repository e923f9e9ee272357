"""Operations that give the same numbers every time, while the demo runs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.utils.deterministic
from torch.nn.attention import SDPBackend, sdpa_kernel

# the module gets its one property when it is imported
MEMORY: Any = torch.utils.deterministic


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Asks PyTorch for such operations, and takes the wish back afterwards.

    On a GPU attention is then computed as written: its other ways add up gradients in any order, and asked to only
    warn, PyTorch keeps them. What no operation has written yet is left as it is: to fill it would cost a step with
    adapters, which has more small results, more than one without.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        # cuBLAS needs a fixed workspace for that; read when the first handle is made
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = MEMORY.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    MEMORY.fill_uninitialized_memory = False
    try:
        with sdpa_kernel(SDPBackend.MATH) if on_gpu else nullcontext():
            yield
    finally:
        MEMORY.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(before, warn_only=warned)
