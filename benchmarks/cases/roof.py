"""How fast this machine copies and multiplies: what the roofline pictures are drawn from.

With K alone, a copy of K bytes; with N and K, a product of two random [K, N] matrices in float32 and bfloat16, by each
of the libraries that PyTorch may use for it.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.case import Case, Check, Provider
from benchmarks.machine import products
from benchmarks.rounding import within_rounding

SHAPES = ({"K": 2**27}, {"N": 2048, "K": 2048})
GPU_SHAPES = ({"K": 2**30}, {"N": 8192, "K": 8192})


def cases(shape: dict[str, int], device: str) -> Iterator[Case]:
    """Yield the copy, or the product in each dtype."""
    import torch

    if "N" not in shape:
        source = torch.ones(shape["K"], dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copy = Provider("torch", lambda: target.copy_(source))
        moved = 2 * shape["K"]
        yield Case("roof", "fwd", shape, "uint8", None, [copy], lambda _: _same(target.copy_(source), source), moved)
        return
    for dtype in (torch.float32, torch.bfloat16):
        yield _product(shape, dtype, device)


def _product(shape: dict[str, int], dtype: Any, device: str) -> Case:
    import torch

    n, k = shape["N"], shape["K"]
    a, b = (torch.randn(k, n, device=device).to(dtype) for _ in range(2))
    ways = products(device)

    def check(name: str) -> Check:
        wide = a.double(), b.double()
        truth, magnitude = (left @ right.T for left, right in (wide, [t.abs() for t in wide]))
        # cuBLAS may add parts of a sum in half precision
        return within_rounding(ways[name](a, b), truth, magnitude, n, roundings=2, parts=(truth,))

    return Case(
        op="roof",
        mode="fwd",
        shape=shape,
        dtype=str(dtype).removeprefix("torch."),
        block_size=None,
        providers=[Provider(name, partial(multiply, a, b)) for name, multiply in ways.items()],
        check=check,
        flops=2 * n * k * k,
    )


def _same(got: Any, source: Any) -> Check:
    import torch

    return Check(torch.equal(got, source), 0.0, 0.0, "a byte of the copy differs")
