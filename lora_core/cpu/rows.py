"""What operations on elements and rows have alike on the CPU: which loops run, and arrays for them."""

from typing import Any

import torch
from torch import Tensor

from lora_core.cpu import compiled

# what arrays of a dtype hold: NumPy has no bfloat16
ELEMENTS = {torch.float32: torch.float32, torch.bfloat16: torch.uint16}


def loops_for(name: str, t: Tensor) -> Any:
    """Return the compiled loops that an operation runs on tensors like this, or None where the reference has to."""
    return compiled.load_for(name, t.numel()) if t.dtype in ELEMENTS and t.numel() else None


def array(t: Tensor) -> Any:
    """Return a tensor's elements as an array of float32, or of uint16 for bfloat16, where they lie."""
    if t.dtype == torch.float32:
        return t.numpy(force=True)
    return t.resolve_neg().view(ELEMENTS[t.dtype]).numpy(force=True)
