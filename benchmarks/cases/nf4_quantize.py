"""Quantising a bf16 weight to NF4 with double-quantised scales, beside bitsandbytes. The shape is N x K."""

import math
from collections.abc import Iterator
from typing import Any

from benchmarks.case import Case, Check, Claim, Provider
from benchmarks.shapes import SQUARE_4096

SHAPES = (SQUARE_4096,)

BLOCK_SIZE = 64
# bitsandbytes multiplies by a reciprocal where this library divides: at a threshold a code may differ
DIFFERING_BYTES = 1e-6


def cases(shape: dict[str, int], device: str) -> Iterator[Case]:
    """Yield the one comparison."""
    import torch

    import lora_core as lc
    from lora_core import reference

    torch.manual_seed(0)
    weight = torch.randn(shape["N"], shape["K"], device=device, dtype=torch.bfloat16)
    truth, _ = reference.nf4.nf4_quantize(weight.cpu(), BLOCK_SIZE)
    n = weight.numel()
    runs = {"lora_core": lambda: lc.quantize_nf4(weight, block_size=BLOCK_SIZE), "bitsandbytes": lambda: _peer(weight)}
    yield Case(
        op="nf4_quantize",
        mode="fwd",
        shape=shape,
        dtype="bfloat16",
        block_size=BLOCK_SIZE,
        providers=[Provider(name, run) for name, run in runs.items()],
        check=lambda name: _check(_codes(runs[name]()), truth),
        # weights read; codes, scales' codes and second scales written
        bytes_moved=2 * n + n // 2 + n // BLOCK_SIZE + 4 * math.ceil(n / BLOCK_SIZE / 256),
        claims=(Claim(against="bitsandbytes", speed=1.5),),
        note="double quantised",
    )


def _peer(weight: Any) -> Any:
    import bitsandbytes.functional as bnb

    return bnb.quantize_4bit(weight, blocksize=BLOCK_SIZE, compress_statistics=True, quant_type="nf4")


def _codes(result: Any) -> Any:
    return (result[0] if isinstance(result, tuple) else result.codes).reshape(-1, 1).cpu()


def _check(codes: Any, truth: Any) -> Check:
    """Compare packed codes; the error is the share of bytes that differ."""
    share = float((codes != truth).double().mean())
    return Check(share <= DIFFERING_BYTES, share, share**0.5, f"{share:.2g} of the packed bytes differ")
