"""The mask that depends on seed and position alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lora_core as lc
from lora_core.reference.dropout import MULTIPLIER_1, MULTIPLIER_2, dropout, keep_mask, mix

SEED = torch.tensor([1234])


def mix_exactly(h: int) -> int:
    """The mixer in Python's unbounded integers."""
    h ^= h >> 16
    h = h * MULTIPLIER_1 % 2**32
    h ^= h >> 15
    h = h * MULTIPLIER_2 % 2**32
    return h ^ h >> 16


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_mixer_is_32_bit_arithmetic(values):
    assert mix(torch.tensor(values)).tolist() == [mix_exactly(v) for v in values]


def test_mixer_is_a_bijection_on_a_sample():
    values = torch.arange(2**20)
    assert mix(values).unique().numel() == 2**20


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 39), st.integers(0, 39), st.sampled_from([0.1, 0.5, 0.9]))
def test_mask_of_a_tile_is_the_tile_of_the_mask(rows, columns, row, column, p):
    whole = keep_mask(SEED, 40, 40, p)
    assert torch.equal(keep_mask(SEED, rows, columns, p), whole[:rows, :columns])
    h = mix_exactly(mix_exactly(1234 ^ mix_exactly(row)) ^ column)
    assert whole[row, column].item() == (h >= round(p * 2**32))


@pytest.mark.parametrize("p", [0.0, 0.05, 0.1, 0.5, 0.9])
def test_mask_keeps_with_probability_one_minus_p(p):
    keep = keep_mask(SEED, 1000, 1000, p)
    n = keep.numel()
    # five standard deviations of a binomial, of the whole and of every row and column sum
    assert abs(keep.sum().item() - n * (1 - p)) <= 5 * (n * p * (1 - p)) ** 0.5
    for sums in (keep.sum(0), keep.sum(1)):
        assert (sums - 1000 * (1 - p)).abs().max() <= 6 * (1000 * p * (1 - p)) ** 0.5


def test_mask_rows_columns_and_seeds_are_uncorrelated():
    a = keep_mask(SEED, 500, 500, 0.5).double() - 0.5
    b = keep_mask(SEED + 1, 500, 500, 0.5).double() - 0.5
    pairs = [(a[:-1], a[1:]), (a[:, :-1], a[:, 1:]), (a, b), (a, a.T.contiguous().roll(1, 0))]
    for x, y in pairs:
        products = (x * y).flatten()
        # each product is +-1/4 with equal chance if the bits are independent: five standard errors
        assert abs(products.sum().item()) <= 5 * 0.25 * products.numel() ** 0.5


@pytest.mark.parametrize("lead", [(), (6,), (2, 3)], ids=str)
def test_dropout_scales_what_it_keeps(lead):
    x = torch.randn(*lead, 8)
    rows = x.numel() // 8
    keep = keep_mask(SEED, rows, 8, 0.25).view(x.shape)
    assert torch.equal(dropout(x, 0.25, SEED), torch.where(keep, x / 0.75, 0))


def test_dropout_of_zero_is_the_input_and_needs_no_seed():
    x = torch.randn(3, 4)
    assert dropout(x, 0.0, None) is x
    with pytest.raises(lc.ConfigError, match="needs a seed"):
        dropout(x, 0.5, None)
