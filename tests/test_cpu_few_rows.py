"""Few rows times an NF4 weight by the compiled loop, against the formula."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_bounds import check_backward, check_forward
from strategies import dropouts, linear_operands, ranks, seeds, sizes

import lora_core as lc
from lora_core.cpu import compiled
from lora_core.cpu import few_rows as few
from lora_core.cpu.nf4_lora_linear import nf4_lora_linear, nf4_lora_linear_backward
from lora_core.cpu.processor import multiplies_bfloat16_tiles
from lora_core.cpu.scales import NONE, Scales
from lora_core.ops.nf4_lora_linear import packed_lora_linear
from lora_core.ops.packed import Packed
from lora_core.reference.lora import shrink

pytest.importorskip("numba")
SEED = torch.tensor([2**40 + 77])
# whatever this processor does best
MOST = 48
DTYPES = [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)]
# ranks, dtypes of x and A, block sizes, nested scales, a bias or a gradient of S, dropout, seeds
OF_A_LAYER = (
    ranks,
    st.sampled_from(DTYPES),
    st.sampled_from([32, 64, 256]),
    st.booleans(),
    st.booleans(),
    dropouts,
    seeds,
)


@pytest.fixture(autouse=True, scope="module")
def small_ones_too():
    assert compiled.load("nf4_product") is not None
    before = few.LEAST, few.FEW_ROWS
    few.LEAST, few.FEW_ROWS = 1, dict.fromkeys(few.FEW_ROWS, MOST)
    yield
    few.LEAST, few.FEW_ROWS = before


@given(
    st.integers(1, MOST),
    sizes,
    # weights are decoded in registers or in the cache as these are multiples of 32, and rows few
    st.one_of(st.integers(1, 300), st.integers(1, 9).map(lambda i: 32 * i)),
    *OF_A_LAYER,
)
def test_few_rows_match_the_formula(m, n, k, r, dtypes, block_size, nested, bias, dropout, seed):
    x, weight, b, lora_a, lora_b = linear_operands(m, n, k, r, *dtypes, seed)
    q = lc.quantize_nf4(weight, block_size, nested)
    assert few.few_rows(x, Packed.of(q)) is not None
    b = b if bias else None
    y, hidden = nf4_lora_linear(x, *Packed.of(q), b, lora_a, lora_b, 0.5, dropout, SEED)
    assert y.dtype == dtypes[0] and y.is_contiguous() and hidden.dtype == dtypes[1]
    check_forward(y, x, q.dequantize(dtypes[0]), b, lora_a, lora_b, 0.5, dropout, SEED, hidden)


@given(
    st.integers(1, 16),
    sizes,
    st.integers(1, 40).map(lambda i: 32 * i),
    *OF_A_LAYER,
)
def test_few_rows_match_the_formula_backward(m, n, k, r, dtypes, block_size, nested, bias, dropout, seed):
    x, weight, _, lora_a, lora_b = linear_operands(m, n, k, r, *dtypes, seed)
    d_y = torch.randn(m, n, dtype=dtypes[0])
    q = lc.quantize_nf4(weight, block_size, nested)
    taken = few.few_rows_back(d_y, Packed.of(q)) is not None
    assert taken or m > compiled.load("nf4_product").PICKED_ROWS
    hidden = shrink(x, lora_a, dropout, SEED)
    rest = (lora_a, lora_b, hidden, 0.5, dropout, SEED)
    grads = nf4_lora_linear_backward(d_y, x, *Packed.of(q), *rest, (True, bias, True, True))
    assert all(g.is_contiguous() for g in grads if g is not None) and (grads[1] is not None) == bias
    wide = q.dequantize(dtypes[0])
    d_x, d_bias, d_a, d_b = grads
    check_backward((d_x, None, d_bias, d_a, d_b), d_y, x, wide, *rest)
    alone, *others = nf4_lora_linear_backward(d_y, None, *Packed.of(q), *rest, (True, False, False, False))
    assert torch.equal(alone, d_x) and others == [None] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_backward_are_the_same_bits_alone_and_on_any_threads(dtype):
    """The weight has more than one part, and the last of them an odd row."""
    w = Packed.of(lc.quantize_nf4(torch.randn(2001, 992, dtype=dtype)))
    d_y, before = torch.randn(7, 2001, dtype=dtype), torch.get_num_threads()
    want = few.few_rows_back(d_y, w)
    wide = w.dense(dtype).double()
    # sums of 2001 products, each a part of at most 16
    assert (want - d_y.double() @ wide).abs().max() <= 2001 * 2.0**-24 * (d_y.double().abs() @ wide.abs()).max()
    if len(d_y) <= compiled.load("nf4_product").PICKED_ROWS:
        for rows in (slice(0, 1), slice(1, 4), slice(2, 7)):
            assert torch.equal(few.few_rows_back(d_y[rows], w), want[rows])
    try:
        torch.set_num_threads(before % 2 + 1)
        assert torch.equal(few.few_rows_back(d_y, w), want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("which", ["gradient", "scale"])
def test_few_rows_backward_keep_an_infinite_last_row_out_of_what_is_not_there(which):
    """Which is alone in its tile: infinite and NaN are where the formula has them, and nowhere else."""
    q = lc.quantize_nf4(torch.randn(33, 64), double_quant=False)
    d_y = torch.ones(2, 33)
    if which == "gradient":
        d_y[0, -1] = torch.inf
    else:
        q.absmax[-1] = torch.inf
    got, want = few.few_rows_back(d_y, Packed.of(q)), d_y @ q.dequantize(torch.float32)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf()) and want.isinf().any()


def test_few_rows_take_no_parts_of_another_dtype():
    """The loops are compiled for theirs; what takes others, or refuses them, is asked instead."""
    w = Packed.of(lc.quantize_nf4(torch.randn(40, 64), double_quant=False))
    for other in (w._replace(absmax=w.absmax.double()), w._replace(absmax=w.absmax.byte())):
        assert few.few_rows(torch.randn(2, 64), other) is few.few_rows_back(torch.randn(2, 40), other) is None


def test_few_rows_backward_are_not_many_of_odd_length_or_of_another_dtype():
    most = compiled.load("nf4_product").PICKED_ROWS
    for rows, columns, dtype, wanted in (
        (0, 64, torch.float32, False),
        (2 * most, 64, torch.float32, True),
        (2 * most + 1, 64, torch.float32, False),
        (most, 64, torch.bfloat16, True),
        (most + 1, 64, torch.bfloat16, False),
        (1, 48, torch.float32, False),
        (1, 64, torch.float16, False),
    ):
        w = Packed.of(lc.quantize_nf4(torch.randn(8, columns)))
        assert (few.few_rows_back(torch.randn(rows, 8).to(dtype), w) is not None) is wanted


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("columns", [1001, 992])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_on_many_threads(threads, columns, dtype):
    """Rows begin inside blocks, and the weight has more than one chunk."""
    x, weight, bias, lora_a, lora_b = linear_operands(3, 1001, columns, 8, dtype, dtype, 0)
    q = lc.quantize_nf4(weight)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = lc.nf4_lora_linear(x[None], q, bias, lora_a, lora_b, 0.5)
    finally:
        torch.set_num_threads(before)
    assert y.shape == (1, 3, 1001)
    check_forward(y[0], x, q.dequantize(dtype), bias, lora_a, lora_b, 0.5)


def test_few_rows_are_not_many_and_of_two_dtypes():
    w = Packed.of(lc.quantize_nf4(torch.randn(8, 64)))
    for rows, dtype, wanted in (
        (0, torch.float32, False),
        (MOST, torch.float32, True),
        (MOST + 1, torch.float32, False),
        (1, torch.float16, False),
        (1, torch.float64, False),
    ):
        assert (few.few_rows(torch.randn(rows, 64).to(dtype), w) is not None) is wanted


@pytest.mark.parametrize("columns", [1001, 992])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_are_the_same_bits_alone_in_any_batch_and_on_any_threads(dtype, columns):
    """The weight has more than one chunk, and as many rows as leave a tile half empty."""
    w = Packed.of(lc.quantize_nf4(torch.randn(2001, columns, dtype=dtype)))
    x, before = torch.randn(7, columns, dtype=dtype), torch.get_num_threads()
    want = few.few_rows(x, w)
    for rows in (slice(0, 1), slice(1, 4), slice(2, 7)):
        assert torch.equal(few.few_rows(x[rows], w), want[rows])
    try:
        torch.set_num_threads(before % 2 + 1)
        assert torch.equal(few.few_rows(x, w), want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("flags", "has"), [("fpu amx_bf16 amx_tile", True), ("fpu amx_tile amx_bf16x", False)])
def test_processors_that_multiply_tiles_of_bfloat16_are_known(flags, has, tmp_path):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
    assert multiplies_bfloat16_tiles(tmp_path / "cpuinfo") is has
    assert not multiplies_bfloat16_tiles(tmp_path / "there is none")


def test_few_rows_are_not_of_a_small_weight_though_all_is_loaded(monkeypatch):
    """Or a layer's output would change bits once some other, larger weight has been decoded."""
    monkeypatch.setattr(few, "LEAST", 8 * 64 + 1)
    x = torch.randn(2, 64)
    assert few.few_rows(x, Packed.of(lc.quantize_nf4(torch.randn(8, 64)))) is None
    assert few.few_rows(x, Packed.of(lc.quantize_nf4(torch.randn(9, 64)))) is not None


# decoded in registers, in the cache, and for a dense product
@pytest.mark.parametrize("rows", [2, 12, 64])
def test_rows_of_a_lazily_negated_x_are_multiplied(rows):
    q, x = lc.quantize_nf4(torch.randn(40, 96)), torch.randn(rows, 96)
    y = lc.nf4_lora_linear(torch._neg_view(x), q, None, None, None, 1.0)
    assert torch.equal(y, lc.nf4_lora_linear(-x, q, None, None, None, 1.0))
    x.requires_grad_()
    y, d_y = lc.nf4_lora_linear(x, q, None, None, None, 1.0), torch.randn(rows, 40)
    found = [torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in (torch._neg_view(d_y), -d_y)]
    assert torch.equal(*found)


@pytest.mark.parametrize("rows", [2, 12, 64])
@pytest.mark.parametrize("nested", [False, True])
def test_parts_too_small_for_their_shape_are_refused(rows, nested):
    """Whether few rows or many: the loops would read what lies behind them."""
    w = Packed.of(lc.quantize_nf4(torch.randn(40, 960), double_quant=nested))
    cuts = {"codes": 10, "absmax": 2} | ({"nested_absmax": 1} if nested else {})
    for short in ({part: getattr(w, part)[:count]} for part, count in cuts.items()):
        with pytest.raises(lc.ShapeError, match=f"{next(iter(short))} has"):
            packed_lora_linear(torch.randn(rows, 960), w._replace(**short), None, None, None, 1.0)


@pytest.mark.parametrize("wide", range(3))
def test_loops_refuse_numbers_of_another_size(wide):
    """They read and write vectors by their address."""
    numba, loops = pytest.importorskip("numba"), compiled.load("nf4_product")
    codes, kind = np.zeros(32, np.uint8), np.empty(0, np.float32)
    arrays = [np.zeros(1, np.float32), np.zeros((1, 2, 32), np.float32), np.zeros((1, 1), np.float32)]
    arrays[wide] = arrays[wide].astype(np.float64)
    absmax, halves, plain = arrays
    alone, scales = (0, 1, np.zeros(1, np.intp), 1, 1), Scales(absmax, *NONE, 256)
    with pytest.raises(numba.core.errors.TypingError, match="want float32"):
        loops.multiply_picked(*alone, codes, scales, halves, kind, plain, 6)
    with pytest.raises(numba.core.errors.TypingError, match="want float32"):
        loops.multiply_back(*alone, codes, scales, plain, kind, halves[None], 1, 6)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_few_rows_do_not_depend_on_the_default_dtype(default, dropout):
    g = torch.Generator().manual_seed(0)
    q = lc.quantize_nf4(torch.randn(256, 256, generator=g))
    x, lora_a, lora_b = (torch.randn(*shape, generator=g).requires_grad_() for shape in ((2, 256), (4, 256), (256, 4)))

    def run():
        y = lc.nf4_lora_linear(x, q, None, lora_a, lora_b, 0.5, dropout, SEED)
        return [y, *torch.autograd.grad(y.sum(), (x, lora_a, lora_b))]

    want = run()
    torch.set_default_dtype(default)
    try:
        got = run()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_few_rows_give_gradients():
    """Where the backward takes up what this forward kept: x, its rows in any layout, and S."""
    q = lc.quantize_nf4(torch.randn(24, 64))
    x = torch.randn(64, 5).T.requires_grad_()
    lora_a, lora_b = torch.randn(3, 64, requires_grad=True), torch.randn(24, 3, requires_grad=True)
    d_y = torch.randn(5, 24)
    y = lc.nf4_lora_linear(x, q, None, lora_a, lora_b, 0.5)
    d_x, d_a, d_b = torch.autograd.grad(y, (x, lora_a, lora_b), d_y)
    _, hidden = nf4_lora_linear(x, *Packed.of(q), None, lora_a, lora_b, 0.5, 0.0, None)
    check_backward((d_x, None, None, d_a, d_b), d_y, x, q.dequantize(), lora_a, lora_b, hidden, 0.5)
