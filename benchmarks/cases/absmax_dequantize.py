"""The scales of a weight from their 8-bit codes, beside the reference. The shape is that of the weight, N x K."""

from collections.abc import Iterator

from benchmarks.case import Case, Provider
from benchmarks.cases.absmax_quantize import BLOCK_SIZE, equal, scales
from benchmarks.shapes import GPU_SCALES, SQUARE_4096

SHAPES = (SQUARE_4096,)
GPU_SHAPES = GPU_SCALES


def cases(shape: dict[str, int], device: str) -> Iterator[Case]:
    """Yield the one comparison."""
    from lora_core.ops.absmax_dequantize import absmax_dequantize
    from lora_core.quant.double import dequantize_absmax, quantize_absmax

    absmax, offset = scales(shape, device)
    codes, absmax2 = quantize_absmax(absmax, offset)
    runs = {
        "lora_core": lambda: absmax_dequantize(codes, absmax2, offset),
        "torch": lambda: dequantize_absmax(codes, absmax2, offset),
    }
    truth = dequantize_absmax(codes.cpu(), absmax2.cpu(), offset.cpu())
    yield Case(
        op="absmax_dequantize",
        mode="fwd",
        shape=shape,
        dtype="float32",
        block_size=BLOCK_SIZE,
        providers=[Provider(name, run) for name, run in runs.items()],
        check=lambda name: equal([runs[name]()], [truth]),
        bytes_moved=5 * codes.numel() + codes.numel() // 64,
    )
