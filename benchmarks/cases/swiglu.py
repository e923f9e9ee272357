"""SwiGLU, the gate of a Llama's MLP, of M rows of K numbers: forward, backward with both gradients, and both.

Beside it silu and a product in PyTorch ("torch"), and the same under torch.compile ("compiled"). bfloat16 on a GPU,
float32 on a CPU.
"""

from collections.abc import Iterator
from typing import Any

from benchmarks import elementwise
from benchmarks.case import Case

SHAPES = ({"M": 1024, "K": 1408},)
GPU_SHAPES = ({"M": 4096, "K": 14336}, {"M": 4096, "K": 28672})


def cases(shape: dict[str, int], device: str) -> Iterator[Case]:
    """Yield one comparison a mode."""
    from lora_core.ops.swiglu import swiglu

    m, k = shape["M"], shape["K"]
    leaves = elementwise.operands(device, (m, k), (m, k))
    # two read and one written; three read and two written
    forward, backward = (leaves[0].element_size() * m * k * tensors for tensors in (3, 5))
    moved = {"fwd": forward, "bwd": backward, "fwdbwd": forward + backward}
    yield from elementwise.cases("swiglu", shape, device, swiglu, _written, {}, leaves, _magnitudes, 1, moved)


def _written(gate: Any, up: Any) -> Any:
    from torch.nn import functional as F

    return F.silu(gate) * up


def _magnitudes(gate: Any, up: Any, d_y: Any) -> tuple[Any, Any, Any]:
    import torch

    sigma, size = torch.sigmoid(gate), gate.abs()
    # 1 - sigma is rounded as 1 is
    return sigma * size * up.abs(), (d_y * up).abs() * sigma * (1 + size), (d_y * gate).abs() * sigma
