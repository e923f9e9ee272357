"""DoRA's row norms of W + s B A by algebra, beside forming the dense update. The shape is N x K, and R.

W is dense, then NF4 with double-quantised scales, which the rival dequantises as this library does. bfloat16 on a GPU,
float32 on a CPU.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from benchmarks.case import Case, Check, Claim, Provider
from benchmarks.rounding import within_rounding
from benchmarks.shapes import GPU_WEIGHTS

SHAPES = ({"N": 2048, "K": 2048, "R": 16},)
GPU_SHAPES = tuple({**shape, "R": 16} for shape in GPU_WEIGHTS)

SCALING = 2.0
BLOCK_SIZE = 64


def cases(shape: dict[str, int], device: str) -> Iterator[Case]:
    """Yield the comparison on a dense W and on an NF4 one."""
    import torch

    import lora_core as lc

    n, k, r = (shape[name] for name in "NKR")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    weight, lora_a, lora_b = (torch.randn(*size, device=device).to(dtype) for size in ((n, k), (r, k), (n, r)))
    yield _case(shape, weight, weight, lora_a, lora_b, dtype.itemsize * n * k)
    q = lc.quantize_nf4(weight, block_size=BLOCK_SIZE)
    moved = n * k // 2 + n * k // BLOCK_SIZE
    yield dataclasses.replace(
        _case(shape, q, q.dequantize(dtype), lora_a, lora_b, moved), block_size=BLOCK_SIZE, note="double quantised"
    )


def _case(shape: dict[str, int], held: Any, dense: Any, lora_a: Any, lora_b: Any, moved: int) -> Case:
    """Return the comparison for W as it is held, with W dense for the truth."""
    from lora_core.ops.dora_norm import dora_norm
    from lora_core.reference import dora

    n, k, r = (shape[name] for name in "NKR")
    runs = {
        "lora_core": lambda: dora_norm(held, lora_a, lora_b, SCALING),
        "torch": lambda: dora.dora_norm_dense(
            held if held is dense else held.dequantize(dense.dtype), lora_a, lora_b, SCALING
        ),
    }
    return Case(
        op="dora_norm",
        mode="fwd",
        shape=shape,
        dtype=str(dense.dtype).removeprefix("torch."),
        block_size=None,
        providers=[Provider(name, run) for name, run in runs.items()],
        check=lambda name: _check(runs[name](), (dense, lora_a, lora_b)),
        bytes_moved=moved,
        flops=2 * n * k * (r + 1),
        claims=(Claim(against="torch", no_slower=True, no_larger=True),),
    )


def _check(norm: Any, operands: tuple[Any, ...]) -> Check:
    """Compare the squares, as a root of a small sum magnifies its error."""
    w, a, b = (t.double() for t in operands)
    truth = (w + SCALING * b @ a).square().sum(1)
    magnitude = (w.abs() + SCALING * b.abs() @ a.abs()).square().sum(1)
    return within_rounding(norm.float().double().square().float(), truth, magnitude, sum(a.shape) * 2, roundings=4)
