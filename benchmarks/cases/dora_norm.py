"""DoRA's row norms of W + s B A by algebra, beside forming the dense update. The shape is N x K, and R.

bfloat16 on a GPU, float32 on a CPU.
"""

from collections.abc import Iterator
from typing import Any

from benchmarks.case import Case, Check, Claim, Provider
from benchmarks.rounding import within_rounding
from benchmarks.shapes import GPU_WEIGHTS

SHAPES = ({"N": 2048, "K": 2048, "R": 16},)
GPU_SHAPES = tuple({**shape, "R": 16} for shape in GPU_WEIGHTS)

SCALING = 2.0


def cases(shape: dict[str, int], device: str) -> Iterator[Case]:
    """Yield the one comparison."""
    import torch

    from lora_core.ops.dora_norm import dora_norm
    from lora_core.reference import dora

    n, k, r = (shape[name] for name in "NKR")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    weight, lora_a, lora_b = (torch.randn(*size, device=device).to(dtype) for size in ((n, k), (r, k), (n, r)))
    operands = (weight, lora_a, lora_b)
    runs = {
        "lora_core": lambda: dora_norm(*operands, SCALING),
        "torch": lambda: dora.dora_norm_dense(*operands, SCALING),
    }
    yield Case(
        op="dora_norm",
        mode="fwd",
        shape=shape,
        dtype=str(dtype).removeprefix("torch."),
        block_size=None,
        providers=[Provider(name, run) for name, run in runs.items()],
        check=lambda name: _check(runs[name](), operands),
        bytes_moved=dtype.itemsize * n * k,
        flops=2 * n * k * (r + 1),
        claims=(Claim(against="torch", no_slower=True, no_larger=True),),
    )


def _check(norm: Any, operands: tuple[Any, ...]) -> Check:
    """Compare the squares, as a root of a small sum magnifies its error."""
    w, a, b = (t.double() for t in operands)
    truth = (w + SCALING * b @ a).square().sum(1)
    magnitude = (w.abs() + SCALING * b.abs() @ a.abs()).square().sum(1)
    return within_rounding(norm.float().double().square().float(), truth, magnitude, sum(a.shape) * 2, roundings=4)
