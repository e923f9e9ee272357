"""The CPU's float32 products by either library, and the LoRA layers made of them."""

import contextlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_bounds import check_backward, check_forward
from strategies import dropouts, linear_operands, ranks, seeds, sizes, values
from tolerance import assert_within_rounding

from lora_core.cpu import low_rank, processor
from lora_core.cpu import product as products
from lora_core.cpu.lora_linear import lora_linear, lora_linear_backward

LIBRARIES = ("mkl", "onednn")
SEED = torch.tensor([2**40 + 77])
libraries = st.sampled_from(LIBRARIES)


@contextlib.contextmanager
def using(library):
    """Make products run by one library, whatever processor and size, and gradients as of few columns or of many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "onednn_is_faster", lambda: library == "onednn")
        patch.setattr(products, "LEAST_OPERATIONS", 1)
        patch.setattr(products, "LEAST_OF_SMALL", 1)
        patch.setattr(low_rank, "MANY", 0 if library == "onednn" else 2**20)
        yield


def matrix(m, n, seed, layout):
    """[m, n], contiguous, as a transpose, or with gaps."""
    t = values(m * n, torch.float32, 1.0, seed).view(m, n)
    return {"rows": t, "columns": t.T.contiguous().T, "gaps": t.repeat_interleave(2, 1)[:, ::2]}[layout]


layouts = st.sampled_from(["rows", "columns", "gaps"])


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("with_bias", [False, True])
@given(m=sizes, n=sizes, k=sizes, of_a=layouts, of_b=layouts, of_bias=st.sampled_from(["rows", "gaps"]), seed=seeds)
def test_product_is_the_formula_by_either_library(m, n, k, of_a, of_b, of_bias, with_bias, library, seed):
    a, b = matrix(m, k, seed, of_a), matrix(n, k, seed + 1, of_b)
    bias = matrix(1, n, seed + 2, of_bias)[0] if with_bias else torch.zeros(n)
    with using(library):
        y = products.product(a, b, bias if with_bias else None)
    assert y.dtype == torch.float32
    assert_within_rounding(y, lambda a, b, bias: a @ b.T + bias, a, b, bias, depth=k + 1)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("factor", [1.0, 0.3])
@given(m=sizes, n=sizes, k=sizes, of_a=layouts, of_b=layouts, seed=seeds)
def test_scaled_product_is_the_formula_by_either_library(m, n, k, of_a, of_b, factor, library, seed):
    a, b = matrix(m, k, seed, of_a), matrix(n, k, seed + 1, of_b)
    with using(library):
        y = products.scaled_product(a, b, factor)
    assert y.is_contiguous()
    assert_within_rounding(y, lambda a, b: factor * (a @ b.T), a, b, depth=k + 1)


@given(sizes, sizes, sizes, layouts, layouts, libraries, seeds)
def test_add_product_is_the_formula_by_either_library(m, n, k, of_b, of_y, library, seed):
    a, b, y = matrix(m, k, seed, "rows"), matrix(n, k, seed + 1, of_b), matrix(m, n, seed + 2, of_y)
    before = y.clone()
    with using(library):
        total = products.add_product(y, a, b)
    assert_within_rounding(total, lambda y, a, b: y + a @ b.T, before, a, b, depth=k + 1)


@given(sizes, sizes, sizes, ranks, st.booleans(), dropouts, libraries, seeds)
def test_lora_linear_on_the_cpu_is_the_formula_by_either_library(m, n, k, r, with_bias, dropout, library, seed):
    x, weight, bias, lora_a, lora_b = linear_operands(m, n, k, r, torch.float32, torch.float32, seed)
    operands = (x, weight, bias if with_bias else None, lora_a, lora_b, 0.5, dropout, SEED)
    d_y = values(m * n, torch.float32, 1.0, seed + n).view(m, n)
    with using(library):
        y, hidden = lora_linear(*operands)
        rest = (x, weight, lora_a, lora_b, hidden, 0.5, dropout, SEED)
        grads = lora_linear_backward(d_y, *rest, (True,) * 5)
    check_forward(y, *operands, hidden)
    check_backward(grads, d_y, *rest)
    assert all(g.is_contiguous() for g in grads)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("rows", [0, 1, 47, 48, 300])
def test_gradient_of_b_is_the_formula_of_few_rows_and_of_many(rows, library):
    """With 3 ranks, 48 rows are many."""
    assert low_rank.TALL * 3 == 48
    d_y, hidden = matrix(rows, 33, 0, "gaps"), matrix(rows, 3, 1, "columns")
    with using(library):
        d_b = low_rank.b_gradient(d_y, hidden, 0.3)
    assert d_b.is_contiguous()
    assert_within_rounding(d_b, lambda g, s: 0.3 * (g.T @ s), d_y, hidden, depth=rows + 1)


def test_onednn_runs_what_is_large_and_dense_and_only_where_it_is_allowed(monkeypatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    large, small = torch.ones(256, 256), torch.ones(16, 16)
    assert products._by_onednn(large, large) and products._by_onednn(large, large.T)
    assert not products._by_onednn(small, small)
    # a call costs more than it saves on a small matrix of as many operations as are enough with a large one
    few, wide = torch.ones(16, 512), torch.ones(1024, 512)
    assert not products._by_onednn(few, torch.ones(512, 512)) and products._by_onednn(few, wide)
    assert not products._by_onednn(large.double(), large.double())
    gaps = large.repeat(1, 2)[:, ::2]
    assert not products._by_onednn(gaps, large) and not products._by_onednn(large, gaps)
    with monkeypatch.context() as without:
        without.setattr(torch.backends.mkldnn, "enabled", False)
        assert not products._by_onednn(large, large)
    assert products._by_onednn(large, large)
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    assert not products._by_onednn(large, large)


@pytest.mark.parametrize(
    ("maker", "capability", "faster"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX512_BF16", True),
        ("GenuineIntel", "AVX512", False),
        ("AuthenticAMD", "AVX2", False),
        ("", "AVX512", False),
    ],
)
def test_onednn_is_chosen_where_mkl_leaves_avx512_unused(monkeypatch, maker, capability, faster):
    monkeypatch.setattr(products, "maker", lambda: maker)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert products.onednn_is_faster.__wrapped__() is (faster and torch.backends.mkldnn.is_available())


def test_the_processors_maker_is_read_from_the_system():
    assert processor.maker() == "" or processor.maker()[0].isalpha()
