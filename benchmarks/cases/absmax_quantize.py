"""Quantising the scales of a weight in blocks of 256, beside the reference. The shape is that of the weight, N x K."""

from collections.abc import Iterator
from typing import Any

from benchmarks.case import Case, Check, Provider
from benchmarks.shapes import GPU_SCALES, SQUARE_4096

SHAPES = (SQUARE_4096,)
GPU_SHAPES = GPU_SCALES

BLOCK_SIZE = 64


def scales(shape: dict[str, int], device: str) -> tuple[Any, Any]:
    """Return the scales of a normal weight in blocks of 64, and their mean."""
    import torch

    from lora_core.quant.double import absmax_offset

    torch.manual_seed(0)
    absmax = torch.randn(shape["N"] * shape["K"] // BLOCK_SIZE, BLOCK_SIZE).abs().amax(1).to(device)
    return absmax, absmax_offset(absmax)


def cases(shape: dict[str, int], device: str) -> Iterator[Case]:
    """Yield the one comparison."""
    from lora_core.ops.absmax_quantize import absmax_quantize
    from lora_core.quant.double import quantize_absmax

    absmax, offset = scales(shape, device)
    runs = {"lora_core": lambda: absmax_quantize(absmax, offset), "torch": lambda: quantize_absmax(absmax, offset)}
    truth = quantize_absmax(absmax.cpu(), offset.cpu())
    yield Case(
        op="absmax_quantize",
        mode="fwd",
        shape=shape,
        dtype="float32",
        block_size=BLOCK_SIZE,
        providers=[Provider(name, run) for name, run in runs.items()],
        check=lambda name: equal(runs[name](), truth),
        bytes_moved=5 * absmax.numel() + absmax.numel() // 64,
    )


def equal(got: Any, truth: Any) -> Check:
    """Demand the same values of every tensor."""
    errors = [(g.cpu().double() - t.double()).abs() for g, t in zip(got, truth, strict=True)]
    worst = max(float(e.max()) for e in errors)
    rms = max(float(e.square().mean().sqrt()) for e in errors)
    return Check(worst == 0, worst, rms, f"off by up to {worst:.3g}")
