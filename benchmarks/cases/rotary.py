"""Rotary embedding of M tokens of N numbers, in heads of 64: forward, backward, and both.

Beside it what transformers' Llama writes ("torch"), and the same under torch.compile ("compiled"). Heads lie as a
projection leaves them, token by token. bfloat16 on a GPU, float32 on a CPU.
"""

from collections.abc import Iterator
from typing import Any

from benchmarks import elementwise
from benchmarks.case import Case

SHAPES = ({"M": 1024, "N": 512},)
GPU_SHAPES = ({"M": 4096, "N": 4096}, {"M": 4096, "N": 8192})

SEQUENCES, HEAD = 2, 64
BASE = 10_000.0


def cases(shape: dict[str, int], device: str) -> Iterator[Case]:
    """Yield one comparison a mode."""
    import torch

    from lora_core.ops.rotary import rotary

    m, n = shape["M"], shape["N"]
    (x,) = elementwise.operands(device, (SEQUENCES, m // SEQUENCES, n // HEAD, HEAD))
    x = x.detach().transpose(1, 2).requires_grad_()
    angle = torch.outer(torch.arange(m // SEQUENCES), BASE ** -(torch.arange(0, HEAD, 2) / HEAD)).repeat(1, 2)[None]
    cos, sin = (t.to(device, x.dtype) for t in (angle.cos(), angle.sin()))

    def written(x: Any) -> Any:
        return x * cos.to(x.dtype)[:, None] + _half_turned(x) * sin.to(x.dtype)[:, None]

    def magnitudes(x: Any, d_y: Any) -> tuple[Any, Any]:
        c, s = (t.double().abs()[:, None] for t in (cos, sin))
        # with the sines of the other half; their halves are alike
        return tuple(t.abs() * c + _half_turned(t).abs() * s for t in (x, d_y))  # type: ignore[return-value]

    moved = 2 * x.element_size() * m * n
    yield from elementwise.cases(
        "rotary",
        shape,
        device,
        lambda x: rotary(x, cos, sin),
        written,
        {},
        (x,),
        magnitudes,
        2,
        {"fwd": moved, "bwd": moved, "fwdbwd": 2 * moved},
    )


def _half_turned(x: Any) -> Any:
    import torch

    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)
