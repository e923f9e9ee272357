"""Whether what a checkpoint holds are numbers."""

from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Say whether a tensor holds neither NaN nor infinity; one of a dtype that cannot be asked is taken to."""
    if not tensor.is_floating_point():
        return True
    try:
        # not every operation knows every 8-bit dtype; float64 holds all their values
        return bool(tensor.double().isfinite().all())
    except NotImplementedError:
        return True
