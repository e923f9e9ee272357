"""Whether what a checkpoint holds are numbers."""

from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Say whether a tensor holds neither NaN nor infinity; a dtype without isfinite counts as finite."""
    try:
        # not every operation knows every dtype of a byte; float32 holds all their values
        wide = tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
        return bool(wide.isfinite().all())
    except (NotImplementedError, RuntimeError):
        return True
