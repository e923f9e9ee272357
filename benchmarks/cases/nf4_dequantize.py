"""Dequantising an NF4 weight with double-quantised scales to bf16. The shape is N x K.

Beside it bitsandbytes, torchao (a format of its own), plain PyTorch ("reference") and the same under torch.compile
("compiled"), and for scale a copy of the dense weight's size ("copy").
"""

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import modes, peers
from benchmarks.case import Case, Check, Claim, Provider
from benchmarks.cases.nf4_lora_linear import packed_bytes, torchao_weight
from benchmarks.llama import bitsandbytes_weight
from benchmarks.peers import Peer
from benchmarks.shapes import GPU_WEIGHTS, SQUARE_4096

SHAPES = (SQUARE_4096,)
GPU_SHAPES = GPU_WEIGHTS

BLOCK_SIZE = 64
# how far the quantisation errors of two NF4 formats may differ: they round scales, not codes, in ways of their own
OWN_FORMAT = 0.05


def cases(shape: dict[str, int], device: str) -> Iterator[Case]:
    """Yield the one comparison: all but torchao read the same packed bytes."""
    import torch

    import lora_core as lc
    from lora_core import reference

    torch.manual_seed(0)
    weight = torch.randn(shape["N"], shape["K"], device=device, dtype=torch.bfloat16)
    ours = lc.quantize_nf4(weight, block_size=BLOCK_SIZE)
    fields = (ours.codes, ours.absmax, ours.nested_absmax, ours.nested_offset, ours.shape, weight.dtype, BLOCK_SIZE)
    n = weight.numel()

    def written() -> Any:
        return reference.nf4.nf4_dequantize(*fields)

    truth = written()
    plain = {"lora_core": ours.dequantize, "reference": written}
    rivals = {
        "compiled": modes.compiled_peer(written, device),
        "bitsandbytes": Peer(("bitsandbytes",), lambda: _bitsandbytes(ours)),
        "torchao": Peer(("torchao",), lambda: torchao_weight(weight).get_original_weight),
    }
    runs, missing = peers.providers(plain, rivals)
    runs["copy"] = truth.clone
    yield Case(
        op="nf4_dequantize",
        mode="fwd",
        shape=shape,
        dtype="bfloat16",
        block_size=BLOCK_SIZE,
        providers=[Provider(name, run) for name, run in runs.items()],
        check=lambda name: (
            own_format(runs[name](), weight, truth) if name == "torchao" else _check(runs[name](), truth)
        ),
        # the packed weight read, the dense one written
        bytes_moved=packed_bytes(n) + 2 * n,
        claims=(
            Claim(against="bitsandbytes", no_slower=True) if device == "cpu" else Claim("bitsandbytes", speed=1.5),
        ),
        note="double quantised",
        missing=missing,
    )


def _bitsandbytes(q: Any) -> Callable[[], Any]:
    from bitsandbytes.functional import dequantize_4bit

    codes, state = bitsandbytes_weight(q)
    return lambda: dequantize_4bit(codes, state)


def own_format(dense: Any, weight: Any, truth: Any) -> Check:
    """Demand of a format of its own that its error against the weight be this format's, but for 5% of its rms."""
    error, ours = ((t.double() - weight.double()).square().mean().sqrt() for t in (dense, truth))
    ratio = float(error / ours)
    largest = float((dense.double() - truth.double()).abs().max())
    return Check(
        abs(ratio - 1) < OWN_FORMAT, largest, float(error), f"quantisation error {ratio:.3f} times this format's"
    )


def _check(dense: Any, truth: Any) -> Check:
    """Demand the same bits."""
    error = (dense.double() - truth.double()).abs()
    rms = float(error.square().mean().sqrt())
    return Check(bool((dense == truth).all()), float(error.max()), rms, f"off by up to {float(error.max()):.3g}")
