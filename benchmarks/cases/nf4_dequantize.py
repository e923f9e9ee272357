"""Dequantising an NF4 weight with double-quantised scales to bf16, beside bitsandbytes. The shape is N x K."""

import math
from collections.abc import Iterator
from typing import Any

from benchmarks.case import Case, Check, Claim, Provider
from benchmarks.shapes import SQUARE_4096

SHAPES = (SQUARE_4096,)

BLOCK_SIZE = 64


def cases(shape: dict[str, int], device: str) -> Iterator[Case]:
    """Yield the one comparison: both read the same packed bytes."""
    import bitsandbytes.functional as bnb
    import torch

    import lora_core as lc
    from lora_core import reference

    torch.manual_seed(0)
    weight = torch.randn(shape["N"], shape["K"], device=device, dtype=torch.bfloat16)
    ours = lc.quantize_nf4(weight, block_size=BLOCK_SIZE)
    packed = ours.to_bitsandbytes()
    state = bnb.QuantState.from_dict(
        {k.removeprefix("weight."): v for k, v in packed.items() if k != "weight"}, device=torch.device(device)
    )
    truth = reference.nf4.nf4_dequantize(
        ours.codes, ours.absmax, ours.nested_absmax, ours.nested_offset, ours.shape, weight.dtype, BLOCK_SIZE
    )
    n = weight.numel()
    runs = {"lora_core": ours.dequantize, "bitsandbytes": lambda: bnb.dequantize_4bit(packed["weight"], state)}
    yield Case(
        op="nf4_dequantize",
        mode="fwd",
        shape=shape,
        dtype="bfloat16",
        block_size=BLOCK_SIZE,
        providers=[Provider(name, run) for name, run in runs.items()],
        check=lambda name: _check(runs[name](), truth),
        # codes, scales' codes and second scales read; weights written
        bytes_moved=n // 2 + n // BLOCK_SIZE + 4 * math.ceil(n / BLOCK_SIZE / 256) + 2 * n,
        claims=(Claim(against="bitsandbytes", speed=0.5),),
        note="double quantised",
    )


def _check(dense: Any, truth: Any) -> Check:
    """Demand the same bits."""
    error = (dense.double() - truth.double()).abs()
    rms = float(error.square().mean().sqrt())
    return Check(bool((dense == truth).all()), float(error.max()), rms, f"off by up to {float(error.max()):.3g}")
