"""Quantising a bf16 weight to NF4 with double-quantised scales. The shape is N x K.

Beside it bitsandbytes, torchao (a format of its own), and plain PyTorch ("reference").
"""

import math
from collections.abc import Iterator
from typing import Any

from benchmarks import peers
from benchmarks.case import Case, Check, Claim, Provider
from benchmarks.cases.nf4_dequantize import own_format
from benchmarks.cases.nf4_lora_linear import torchao_weight
from benchmarks.peers import Peer
from benchmarks.shapes import GPU_WEIGHTS, SQUARE_4096

SHAPES = (SQUARE_4096,)
GPU_SHAPES = GPU_WEIGHTS

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
    plain = {
        "lora_core": lambda: lc.quantize_nf4(weight, block_size=BLOCK_SIZE),
        "reference": lambda: _reference(weight),
    }
    rivals = {
        "bitsandbytes": Peer(("bitsandbytes",), lambda: lambda: _peer(weight)),
        "torchao": Peer(("torchao",), lambda: lambda: torchao_weight(weight)),
    }
    runs, missing = peers.providers(plain, rivals)

    def check(name: str) -> Check:
        if name == "torchao":
            dense = lc.quantize_nf4(weight, block_size=BLOCK_SIZE).dequantize()
            return own_format(runs[name]().get_original_weight(), weight, dense)
        return _check(_codes(runs[name]()), truth)

    yield Case(
        op="nf4_quantize",
        mode="fwd",
        shape=shape,
        dtype="bfloat16",
        block_size=BLOCK_SIZE,
        providers=[Provider(name, run) for name, run in runs.items()],
        check=check,
        # weights read; codes, scales' codes and second scales written
        bytes_moved=2 * n + n // 2 + n // BLOCK_SIZE + 4 * math.ceil(n / BLOCK_SIZE / 256),
        claims=(Claim(against="bitsandbytes", speed=3.0),),
        note="double quantised",
        missing=missing,
    )


def _reference(weight: Any) -> Any:
    from lora_core.quant import double
    from lora_core.reference import nf4

    codes, absmax = nf4.nf4_quantize(weight, BLOCK_SIZE)
    offset = double.absmax_offset(absmax)
    return codes, *double.quantize_absmax(absmax, offset), offset


def _peer(weight: Any) -> Any:
    import bitsandbytes.functional as bnb

    return bnb.quantize_4bit(weight, blocksize=BLOCK_SIZE, compress_statistics=True, quant_type="nf4")


def _codes(result: Any) -> Any:
    return (result[0] if isinstance(result, tuple) else result.codes).reshape(-1, 1).cpu()


def _check(codes: Any, truth: Any) -> Check:
    """Compare packed codes; the error is the share of bytes that differ."""
    share = float((codes != truth).double().mean())
    return Check(share <= DIFFERING_BYTES, share, share**0.5, f"{share:.2g} of the packed bytes differ")
