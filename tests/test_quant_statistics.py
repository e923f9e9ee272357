"""Errors and level shares of quantised weights, on weights whose figures are known in advance."""

import math

import pytest
import torch

from lora_core.errors import ShapeError
from lora_core.quant import quantize
from lora_core.quant.codebook import codebook
from lora_core.quant.statistics import level_shares, weight_error

KINDS = ["nf4", "fp4", "int4"]


@pytest.mark.parametrize("kind", KINDS)
def test_weight_error_is_nothing_where_every_weight_is_a_level(kind):
    weight = codebook(kind).levels.repeat(4)
    error = weight_error(weight, quantize(weight, kind, 64, double_quant=False))
    assert (error.mean_square, error.relative, error.largest, error.snr_db) == (0, 0, 0, math.inf)


def test_weight_error_of_one_moved_weight_is_its_distance_to_the_level():
    weight = torch.zeros(2, 32)
    weight[0, 0], weight[1, 7] = 1.0, 0.45
    error = weight_error(weight, quantize(weight, "nf4", 64, double_quant=False))
    # the level nearest to 0.45; float32 operands make the difference exact in float64
    moved = abs(codebook("nf4").levels[12].item() - weight[1, 7].item())
    assert error.largest == moved
    assert error.mean_square == moved**2 / 64
    # one rounding of the norm, one of the quotient, on each side
    assert math.isclose(error.relative, moved / math.hypot(1.0, weight[1, 7].item()), rel_tol=4 * 2.0**-52)
    assert error.snr_db == -20 * math.log10(error.relative)


def test_weight_error_counts_what_double_quantisation_adds():
    weight = torch.randn(64, 64)
    held = quantize(weight, "nf4", 64, double_quant=True)
    wanted = (held.dequantize() - weight).double()
    assert weight_error(weight, held).mean_square == wanted.square().mean().item()
    assert weight_error(weight, held) != weight_error(weight, quantize(weight, "nf4", 64, double_quant=False))


@pytest.mark.parametrize("kind", KINDS)
def test_weight_error_of_a_zero_weight_is_nothing(kind):
    zeros = torch.zeros(64)
    assert weight_error(zeros, quantize(zeros, kind, 64, double_quant=False)).relative == 0


@pytest.mark.parametrize("kind", KINDS)
def test_level_shares_count_every_weight_once_and_no_filler(kind):
    # an odd count leaves half a byte over; 1.0 is the block's maximum in every codebook
    levels = codebook(kind).levels
    top = int(levels.argmax())
    weight = torch.cat([levels.repeat(2), levels[top].repeat(3)])
    shares = level_shares(quantize(weight, kind, 64, double_quant=False))
    wanted = torch.full((16,), 2.0, dtype=torch.float64)
    wanted[top] += 3
    if kind == "fp4":
        # +0 and -0 are two codes of one value, and both encode to +0
        wanted[8], wanted[0] = 0, 4
    assert torch.equal(shares, wanted / 35)


def test_statistics_refuse_another_weight_and_an_empty_one():
    held = quantize(torch.ones(4, 16))
    with pytest.raises(ShapeError, match=r"\(16, 4\)"):
        weight_error(torch.ones(16, 4), held)
    empty = quantize(torch.ones(0))
    with pytest.raises(ShapeError, match="empty"):
        weight_error(torch.ones(0), empty)
    with pytest.raises(ShapeError, match="uses no level"):
        level_shares(empty)
