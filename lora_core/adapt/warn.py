"""Warnings in the name of whoever called a verb."""

import sys
import warnings

# a verb's own files, and what runs its with blocks
INSIDE = ("lora_core.adapt.", "contextlib", "torch.utils._contextlib")


def warn(message: str) -> None:
    """Warn, and show the line that called into lora_core.adapt, however deep inside this stands."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and (frame.f_globals.get("__name__") or "").startswith(INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)
