"""Dropout by hashes in 32 bits, by PyTorch's operations and by compiled loops: the reference's bits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_core.cpu import compiled
from lora_core.cpu import dropout as fast
from lora_core.errors import ConfigError
from lora_core.reference.dropout import dropout

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
PROBABILITIES = st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 0.5, 2.0**-32, 1 - 2.0**-33])


def same_bits(x, p, seed):
    """By PyTorch's operations and, where Numba is installed, by loops."""
    want = dropout(x, p, seed)
    for load_for in (lambda name, count: None, lambda name, count: compiled.load(name)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiled, "load_for", load_for)
            got = fast.dropped(x, p, seed)
        assert got.dtype == x.dtype and got.shape == x.shape
        assert torch.equal(got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8))


@given(
    st.lists(st.integers(0, 9), max_size=2),
    st.integers(0, 300),
    PROBABILITIES,
    st.integers(-(2**63), 2**63 - 1),
    st.sampled_from(DTYPES),
)
def test_drops_what_the_reference_drops(leading, columns, p, seed, dtype):
    x = torch.randn(*leading, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    same_bits(x, p, torch.tensor([seed]))


@pytest.mark.parametrize("together", [1, 64, 1000])
@pytest.mark.parametrize("columns", [1, 63, 130])
def test_drops_the_same_by_however_many_rows(monkeypatch, together, columns):
    monkeypatch.setattr(fast, "TOGETHER", together)
    same_bits(torch.randn(37, columns), 0.3, torch.tensor([5]))
    # as rows and columns past 2^16 hash
    same_bits(torch.randn(70_000, 1), 0.3, torch.tensor([5]))
    same_bits(torch.randn(1, 70_000), 0.3, torch.tensor([5]))


def test_drops_infinities_and_reads_any_strides():
    x = torch.randn(24, 48, generator=torch.Generator().manual_seed(1))
    x[::5], x[1::5], x[2::5] = torch.inf, torch.nan, -0.0
    same_bits(x.T, 0.5, torch.tensor([7]))
    same_bits(x[1::2, ::3], 0.5, torch.tensor([7]))
    same_bits(x[:1].expand(9, 48), 0.5, torch.tensor([7]))


def test_drops_nothing_without_a_probability_and_wants_a_seed():
    x = torch.randn(3, 4)
    assert fast.dropped(x, 0.0, None) is x
    with pytest.raises(ConfigError, match="needs a seed"):
        fast.dropped(x, 0.5, None)


def test_a_backward_makes_the_mask_of_a_seed_once(monkeypatch):
    made = []
    gone = fast._gone
    monkeypatch.setattr(fast, "_gone", lambda *given: made.append(given) or gone(*given))
    drop, seeds = fast.one_mask_each(), [torch.tensor([3]), torch.tensor([4])]
    x, other = torch.randn(5, 6), torch.randn(5, 6)
    for seed in seeds:
        for p in (0.3, 0.5):
            for t in (x, other):
                assert torch.equal(drop(t, p, seed), dropout(t, p, seed))
    assert len(made) == 4


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_share_the_rows_of_a_mask(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        same_bits(torch.randn(2000, 300), 0.4, torch.tensor([9]))
    finally:
        torch.set_num_threads(before)


def test_a_mask_is_made_where_x_is_whatever_the_default_device():
    x, seed = torch.randn(5, 6), torch.tensor([3])
    with torch.device("meta"):
        made = fast.dropped(x, 0.4, seed)
    assert torch.equal(made, dropout(x, 0.4, seed))
