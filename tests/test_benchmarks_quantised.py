"""What the check of quantised weights rejects: codes alone say nothing about their scales."""

from types import SimpleNamespace

import pytest
import torch

import lora_core as lc
from benchmarks import run
from benchmarks.cases import nf4_quantize
from lora_core import reference
from lora_core.quant.codebook import codebook
from lora_core.quant.double import quantize_absmax

SHAPE = {"N": 64, "K": 512}
FIELDS = ("codes", "absmax", "nested_absmax", "nested_offset")


def parts_of(weight):
    q = lc.quantize_nf4(weight, block_size=nf4_quantize.BLOCK_SIZE)
    return {name: getattr(q, name) for name in FIELDS}


# a packed byte, a scale by four levels, and what all scales are made of by 1%
PLANTED = {
    "codes": lambda p: p | {"codes": torch.cat([p["codes"].flatten()[:1] ^ 1, p["codes"].flatten()[1:]])},
    "a scale": lambda p: p | {"absmax": torch.cat([p["absmax"][:1] ^ 4, p["absmax"][1:]])},
    "second-level scales": lambda p: p | {"nested_absmax": p["nested_absmax"] * 1.01},
    "offset alone": lambda p: p | {"nested_offset": p["nested_offset"] * 1.01},
}


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("planted", PLANTED)
def test_a_quantised_weight_whose_parts_are_off_does_not_pass(planted, exact):
    weight = torch.randn(SHAPE["N"], SHAPE["K"], generator=torch.Generator().manual_seed(0)).bfloat16()
    truth = reference.nf4.nf4_quantize(weight, nf4_quantize.BLOCK_SIZE)
    parts = parts_of(weight)

    def check(given):
        return nf4_quantize._check(nf4_quantize._parts(SimpleNamespace(**given)), truth, exact)

    assert check(parts).passed
    assert not check(PLANTED[planted](parts)).passed


def test_codes_without_scales_are_no_quantised_weight():
    weight = torch.ones(1, 64).bfloat16()
    with pytest.raises(AttributeError):
        nf4_quantize._parts(SimpleNamespace(codes=parts_of(weight)["codes"]))


def test_an_offset_that_is_not_the_mean_does_not_pass_with_the_scales_made_for_it():
    weight = torch.randn(SHAPE["N"], SHAPE["K"], generator=torch.Generator().manual_seed(0)).bfloat16()
    truth = reference.nf4.nf4_quantize(weight, nf4_quantize.BLOCK_SIZE)
    offset = truth[1].mean() * 1.01
    outcome = nf4_quantize._check(
        (truth[0].flatten(), *quantize_absmax(truth[1], offset), offset.reshape(1)), truth, True
    )
    assert not outcome.passed and outcome.reason.startswith("the offset")


def test_the_case_demands_the_same_bits_of_this_librarys_scales(monkeypatch):
    case, quantise = next(run.cases_of("nf4_quantize", SHAPE, "cpu")), lc.quantize_nf4
    assert case.check("lora_core").passed

    def off(weight, block_size):
        parts = {name: getattr(quantise(weight, block_size=block_size), name) for name in FIELDS}
        # less than a lookup is allowed to be off
        return SimpleNamespace(**parts | {"nested_absmax": parts["nested_absmax"] * (1 + 2**-20)})

    monkeypatch.setattr(lc, "quantize_nf4", off)
    assert case.check("lora_core").reason.startswith("a scale")


def test_scales_looked_up_by_16_bits_of_their_quotient_pass_only_where_bits_may_differ():
    """As the middle of the quotient's cell, 2^-15 wide, has them."""
    absmax = 1 + torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    offset = absmax.mean()
    _, nested = quantize_absmax(absmax, offset)
    scale = nested.repeat_interleave(256)[: absmax.numel()]
    middle = (((absmax - offset) / scale * 2**15).floor() + 0.5) / 2**15
    codes = codebook("dynamic").encode(middle)
    truth = torch.zeros(1), absmax
    parts = (torch.zeros(1), codes, nested, offset.reshape(1))
    assert nf4_quantize._check(parts, truth, exact=False).passed
    assert not nf4_quantize._check(parts, truth, exact=True).passed
    # one level further, where the next is wider than a cell
    shifted = codes.clone()
    shifted[0] += 1 if codes[0] < 254 else -1
    assert not nf4_quantize._check((parts[0], shifted, *parts[2:]), truth, exact=False).passed
