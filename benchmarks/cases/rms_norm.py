"""RMS norm of M rows of N numbers: forward, backward with gradients of x and the weight, and both.

Beside it what transformers' Llama writes ("torch"), the same under torch.compile ("compiled"), and PyTorch's own
function ("torch rms_norm"). bfloat16 on a GPU, float32 on a CPU.
"""

from collections.abc import Iterator
from typing import Any

from benchmarks import elementwise
from benchmarks.case import Case

SHAPES = ({"M": 1024, "N": 512},)
GPU_SHAPES = ({"M": 4096, "N": 4096}, {"M": 4096, "N": 8192})

EPS = 1e-6


def cases(shape: dict[str, int], device: str) -> Iterator[Case]:
    """Yield one comparison a mode."""
    from torch.nn import functional as F

    from lora_core.ops.rms_norm import rms_norm

    m, n = shape["M"], shape["N"]
    leaves = x, weight = elementwise.operands(device, (m, n), (n,))
    # x read and y written; dL/dy and x read, dL/dx written
    forward, backward = (x.element_size() * m * n * tensors for tensors in (2, 3))
    yield from elementwise.cases(
        "rms_norm",
        shape,
        device,
        lambda x, w: rms_norm(x, w, EPS),
        _written,
        {"torch rms_norm": lambda x, w: F.rms_norm(x, (n,), w, EPS)},
        leaves,
        _magnitudes,
        max(m, n),
        {"fwd": forward, "bwd": backward, "fwdbwd": forward + backward},
    )


def _written(x: Any, weight: Any) -> Any:
    import torch

    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def _magnitudes(x: Any, weight: Any, d_y: Any) -> tuple[Any, Any, Any]:
    import torch

    r = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    n, h = (x * r).abs(), (d_y * weight).abs()
    return n * weight.abs(), r * (h + n * (h * n).mean(-1, keepdim=True)), (d_y.abs() * n).sum(0)
