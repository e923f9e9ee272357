"""Quantising a bf16 weight to NF4 with double-quantised scales. The shape is N x K.

Beside it bitsandbytes, torchao (a format of its own), and plain PyTorch ("reference").
"""

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import peers
from benchmarks.case import Case, Check, Claim, Provider
from benchmarks.cases.nf4_dequantize import own_format
from benchmarks.cases.nf4_lora_linear import packed_bytes, torchao_weight
from benchmarks.peers import Peer
from benchmarks.rounding import UNIT_FP32, within_rounding
from benchmarks.shapes import GPU_WEIGHTS, SQUARE_4096

SHAPES = (SQUARE_4096,)
GPU_SHAPES = GPU_WEIGHTS

BLOCK_SIZE = 64
# bitsandbytes multiplies by a reciprocal where this library divides: at a threshold a code may differ
DIFFERING_BYTES = 1e-6
# of the second-level scale: on a CPU bitsandbytes looks a scale's code up by 16 bits of a quotient from -1 to 1
LOOKED_UP = 2 / 2**16


def cases(shape: dict[str, int], device: str) -> Iterator[Case]:
    """Yield the one comparison."""
    import torch

    import lora_core as lc
    from lora_core import reference

    torch.manual_seed(0)
    weight = torch.randn(shape["N"], shape["K"], device=device, dtype=torch.bfloat16)
    truth = reference.nf4.nf4_quantize(weight.cpu(), BLOCK_SIZE)
    n = weight.numel()
    plain = {
        "lora_core": lambda: lc.quantize_nf4(weight, block_size=BLOCK_SIZE),
        "reference": lambda: _reference(weight),
    }
    rivals = {
        "bitsandbytes": Peer(("bitsandbytes",), lambda: lambda: _peer(weight)),
        "torchao": Peer(("torchao",), lambda: _torchao(weight)),
    }
    runs, missing = peers.providers(plain, rivals)

    def check(name: str) -> Check:
        if name == "torchao":
            dense = lc.quantize_nf4(weight, block_size=BLOCK_SIZE).dequantize()
            return own_format(runs[name]().get_original_weight(), weight, dense)
        return _check(_parts(runs[name]()), truth, exact=name != "bitsandbytes")

    yield Case(
        op="nf4_quantize",
        mode="fwd",
        shape=shape,
        dtype="bfloat16",
        block_size=BLOCK_SIZE,
        providers=[Provider(name, run) for name, run in runs.items()],
        check=check,
        # the dense weight read, the packed one written
        bytes_moved=2 * n + packed_bytes(n),
        claims=(Claim(against="bitsandbytes", speed=3.0),),
        note="double quantised",
        missing=missing,
    )


def _torchao(weight: Any) -> Callable[[], Any]:
    # raises where it does not take a weight of this size
    torchao_weight(weight)
    return lambda: torchao_weight(weight)


def _reference(weight: Any) -> Any:
    from lora_core.quant import double
    from lora_core.reference import nf4

    codes, absmax = nf4.nf4_quantize(weight, BLOCK_SIZE)
    offset = double.absmax_offset(absmax)
    return codes, *double.quantize_absmax(absmax, offset), offset


def _peer(weight: Any) -> Any:
    import bitsandbytes.functional as bnb

    return bnb.quantize_4bit(weight, blocksize=BLOCK_SIZE, compress_statistics=True, quant_type="nf4")


def _parts(result: Any) -> tuple[Any, ...]:
    """Return what a provider made, on the CPU: codes, scales' codes, second-level scales, offset."""
    if not isinstance(result, tuple):
        result = result.codes, result.absmax, result.nested_absmax, result.nested_offset
    elif len(result) == 2:
        codes, state = result
        result = codes, state.absmax, state.state2.absmax, state.offset
    return tuple(part.reshape(-1).cpu() for part in result)


def _check(parts: tuple[Any, ...], truth: tuple[Any, Any], exact: bool) -> Check:
    """Compare packed codes and scales; the error is the share of the packed bytes that differ.

    Args:
        parts: as `_parts` returns them.
        truth: packed codes and scales, not quantised.
        exact: whether scales have to be the same bits; else they may be as far off as bitsandbytes' lookup makes them.
    """
    from lora_core.quant.double import NESTED_BLOCK_SIZE, dequantize_absmax, quantize_absmax

    codes, *scales = parts
    true_codes, absmax = truth
    share = float((codes != true_codes.reshape(-1)).double().mean())
    # its last bits depend on the order of summation: what the codes should be follows from the one given
    mean, offset = absmax.double().mean(), scales[-1]
    summed = within_rounding(offset, mean, mean, absmax.numel(), roundings=1)
    nested = scales[1].repeat_interleave(NESTED_BLOCK_SIZE)[: absmax.numel()]
    nearest = dequantize_absmax(*quantize_absmax(absmax, offset), offset)
    got = dequantize_absmax(*scales)
    # either scale's product and sum are rounded
    allowed = LOOKED_UP * nested.double() + 4 * UNIT_FP32 * absmax
    further = (got.double() - absmax).abs() - (nearest.double() - absmax).abs()
    scales_right = got.equal(nearest) if exact else bool((further <= allowed).all())
    reasons = (
        (share <= DIFFERING_BYTES, f"{share:.2g} of the packed bytes differ"),
        (summed.passed, f"the offset: {summed.reason}"),
        (scales_right, f"a scale is up to {float((got / nearest - 1).abs().max()):.2g} of it off"),
    )
    wrong = [reason for right, reason in reasons if not right]
    return Check(not wrong, share, share**0.5, "; ".join(wrong))
