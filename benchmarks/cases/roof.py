"""How fast this machine copies and multiplies: what the roofline pictures are drawn from.

With K alone, a copy of K bytes; with N and K, a product of two [K, N] matrices in float32 and bfloat16, by each of the
libraries that PyTorch may use for it.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.case import Case, Check, Provider
from benchmarks.machine import products

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
        yield Case("roof", "fwd", shape, "uint8", None, [copy], lambda _: _check(target.copy_(source), source), moved)
        return
    for dtype in (torch.float32, torch.bfloat16):
        yield _product(shape, dtype, device)


def _product(shape: dict[str, int], dtype: Any, device: str) -> Case:
    import torch

    n, k = shape["N"], shape["K"]
    # small whole numbers: the product is exact in float32, and a power of two in bfloat16
    a, b = (torch.ones(k, n, dtype=dtype, device=device) for _ in range(2))
    truth = torch.full((k, k), float(n), device=device)
    ways = products(device)
    return Case(
        op="roof",
        mode="fwd",
        shape=shape,
        dtype=str(dtype).removeprefix("torch."),
        block_size=None,
        providers=[Provider(name, partial(multiply, a, b)) for name, multiply in ways.items()],
        check=lambda name: _check(ways[name](a, b), truth),
        flops=2 * n * k * k,
    )


def _check(got: Any, truth: Any) -> Check:
    error = (got.float() - truth.float()).abs().max()
    return Check(bool(error == 0), float(error), float(error), f"off by up to {float(error):g}")
