"""Products of float32 matrices on a CPU, by the faster of the two libraries PyTorch carries.

PyTorch multiplies float32 matrices with MKL, whose speed on processors of other makers than Intel is that of AVX2, also
where they have AVX-512. oneDNN, which PyTorch uses for half precision and convolutions, runs AVX-512 there: a product
of [1024, 512] and [512, 512] ran at 213 and at 468 GFLOP/s on two cores of an AMD EPYC. Both are float32 throughout.

torch.backends.mkldnn.flags(enabled=False) switches oneDNN off here as elsewhere.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.cpu.processor import INTEL, has_avx512, maker
from lora_core.ops.scaled import scaled

# a call of oneDNN costs some 11 us more than one of MKL, and some 60 where nothing of it is in the caches: below so
# many operations that is more than it saves; below so many, too, where b has fewer elements than SMALL
LEAST_OPERATIONS, LEAST_OF_SMALL, SMALL = 4_000_000, 32_000_000, 2**19


@functools.cache
def onednn_is_faster() -> bool:
    """Say whether this processor has AVX-512 that MKL does not use, and this PyTorch oneDNN's product."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and has_avx512()
        and maker() not in (INTEL, "")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return a b^T + bias; a [M, K], b [N, K], bias [N]."""
    if _by_onednn(a, b):
        return _onednns(a, b, bias)
    # the same product, which reaches MKL 1 to 8 us sooner where b is stored by columns
    return torch.mm(a, b.T) if bias is None else F.linear(a, b, bias)


def scaled_product(a: Tensor, b: Tensor, factor: float, by_mkl: bool = False) -> Tensor:
    """Return factor a b^T, by MKL whatever the size where the shape is known to suit it."""
    if not by_mkl and _by_onednn(a, b):
        y = _onednns(a, b)
        return y if factor == 1.0 else y.mul_(factor)
    return scaled(a, b, factor)


def add_product(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return y + a b^T, y [M, N] perhaps changed in place."""
    if _by_onednn(a, b):
        total: Tensor = torch.ops.mkldnn._linear_pointwise.binary(a, y, b, None, "add")
        return total
    return y.addmm_(a, b.T)


def _onednns(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    # it reads a bias as if it were contiguous
    dense = None if bias is None else bias.contiguous()
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(a, b, dense, "none", [], "")
    return y


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    if not onednn_is_faster():
        return False
    elements = b.numel()
    operations = 2 * a.shape[0] * elements
    # most calls with few rows end here
    if operations < LEAST_OPERATIONS or (elements < SMALL and operations < LEAST_OF_SMALL):
        return False
    return a.dtype == torch.float32 and _is_dense(a) and _is_dense(b) and bool(torch.backends.mkldnn.enabled)


def _is_dense(t: Tensor) -> bool:
    return t.is_contiguous() or t.T.is_contiguous()
