"""What kernels log: at level DEBUG of "lora_core.kernels", which way an operation takes and what it copies first."""

import logging

from torch import Tensor

log = logging.getLogger("lora_core.kernels")


def log_launch(name: str, path: str, *copied: Tensor | None) -> None:
    """Say at level DEBUG which path an operation takes, and whether it has to copy any of these tensors first."""
    if log.isEnabledFor(logging.DEBUG):
        copies = sum(t is not None and not t.is_contiguous() for t in copied)
        log.debug("%s: %s%s", name, path, f", copies {copies} operands" if copies else "")
