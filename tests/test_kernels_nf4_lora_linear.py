"""The kernels of nf4_lora_linear and its backward against float64: on a GPU, or in Triton's interpreter."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_bounds import check_backward, check_forward, wide
from strategies import block_sizes, dropouts, dtype_pairs, linear_operands, ranks, seeds, sizes, values
from tolerance import UNIT_FP32, assert_within_bound

import lora_core as lc
from lora_core.kernels.crossover import PATHS
from lora_core.kernels.dora_norm import launch_nf4_dora_norm
from lora_core.kernels.lora_linears import launch_lora_linears, launch_lora_linears_backward
from lora_core.kernels.nf4_columns import launch_nf4_columns
from lora_core.kernels.nf4_lora_linear import (
    launch_nf4_lora_linear,
    launch_nf4_lora_linear_backward,
    packed_input_gradient,
)
from lora_core.kernels.nf4_matmul import MOST_TOKENS, launch_nf4_matmul
from lora_core.kernels.nf4_panels import PANEL_BYTES, TILE_OF_Y, column_panels, row_panels
from lora_core.kernels.nf4_tile import as_read
from lora_core.ops.packed import Packed, flatten
from lora_core.quant import double

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED = torch.tensor([2**40 + 77], device=DEVICE)
paths = st.sampled_from(PATHS)
# few tokens take one way, more another
tokens = st.sampled_from([1, 3, 16, 17, 63, 64, 65, 100])
# multiples of 16 are read by the word, the others element by element; a block may straddle rows
columns = st.sampled_from([1, 7, 8, 48, 64, 67, 136, 144, 192])
# about as many as a panel of columns has at least; the same
many_columns = st.sampled_from([64, 512, 515, 520])


def quantised(weight, block_size, nested):
    """W in NF4, and as the dense matrix it stands for, in the same dtype."""
    q = lc.quantize_nf4(weight, block_size, nested)
    return Packed.of(q), q.dequantize(weight.dtype)


@given(tokens, sizes, columns, ranks, dtype_pairs, block_sizes, st.booleans(), st.booleans(), dropouts, paths, seeds)
def test_nf4_lora_linear_kernels_match_the_formula(m, n, k, r, dtypes, block, nested, bias, dropout, path, seed):
    x, weight, b, lora_a, lora_b = linear_operands(m, n, k, r, *dtypes, seed, DEVICE)
    w, dense = quantised(weight, block, nested)
    b = b if bias else None
    # panels as small as they can be
    y, hidden = launch_nf4_lora_linear(x, *w, b, lora_a, lora_b, 0.5, dropout, SEED, path, panel_bytes=1)
    assert y.dtype == dtypes[0] and hidden.dtype == dtypes[1]
    check_forward(y, x, dense, b, lora_a, lora_b, 0.5, dropout, SEED, hidden, "either")


@given(tokens, sizes, columns, ranks, dtype_pairs, block_sizes, st.booleans(), dropouts, paths, seeds)
def test_nf4_lora_linear_backward_kernels_match_the_formula(m, n, k, r, dtypes, block, nested, dropout, path, seed):
    x, weight, _, lora_a, lora_b = linear_operands(m, n, k, r, *dtypes, seed, DEVICE)
    w, dense = quantised(weight, block, nested)
    d_y = values(m * n, dtypes[0], 1.0, seed + 1).view(m, n).to(DEVICE)
    hidden = values(m * r, dtypes[1], 1.0, seed + 2).view(m, r).to(DEVICE)
    rest = (lora_a, lora_b, hidden, -0.7, dropout, SEED)
    d_x, *others = launch_nf4_lora_linear_backward(d_y, x, *w, *rest, (True,) * 4, path)
    check_backward((d_x, None, *others), d_y, x, dense, *rest)


@given(st.integers(1, MOST_TOKENS), sizes, st.sampled_from([64, 67, 512]), st.integers(1, 5), st.booleans(), seeds)
def test_nf4_matmul_kernel_splits_its_sum_without_a_trace(m, n, k, splits, transposed, seed):
    x, weight, _, _, lora_b = linear_operands(m, n, k, 3, torch.bfloat16, torch.bfloat16, seed, DEVICE)
    w, dense = quantised(weight, 64, True)
    if transposed:
        dense, lora_b = dense.T, values(k * 3, torch.bfloat16, 1.0, seed).view(k, 3).to(DEVICE)
        x = values(m * n, torch.bfloat16, 1.0, seed).view(m, n).to(DEVICE)
    hidden = torch.eye(m, 3, device=DEVICE).bfloat16()
    y = launch_nf4_matmul(x, *w, None, hidden, lora_b, 0.5, transposed=transposed, splits=splits)
    # the same formula: x and S side by side, S given as x's first columns times one
    both = torch.cat([x, hidden], 1), torch.cat([dense, 0.5 * lora_b], 1)
    nothing = lora_b[:0].new_zeros(0, both[0].shape[1]), lora_b.new_zeros(len(dense), 0)
    check_forward(y, *both, None, *nothing, 0.0, rounded="either")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("k", "block"), [(67, 32), (48, 64), (144, 32), (144, 64), (192, 64), (192, 128)])
def test_nf4_matmul_kernel_reads_every_element_as_the_reference_does(k, block, nested, transposed):
    """Where it is read by the element, by the word and by 64 columns, to the bit; each block's scale is its own."""
    n = 48
    weight = torch.randn(-(-n * k // block), block) * torch.logspace(-2, 2, -(-n * k // block))[:, None]
    w, dense = quantised(weight.flatten()[: n * k].view(n, k).to(DEVICE), block, nested)
    ones = torch.eye(n if transposed else k, device=DEVICE)
    none = ones.new_zeros(1, k).T if transposed else ones.new_zeros(n, 1)
    parts = ones.split(MOST_TOKENS)
    found = [launch_nf4_matmul(x, *w, None, x[:, :1] * 0, none, 1.0, transposed=transposed) for x in parts]
    assert torch.equal(torch.cat(found), dense if transposed else dense.T)


@given(st.integers(1, 300), columns, block_sizes, st.booleans(), st.integers(1, 20_000))
def test_panels_of_rows_put_together_are_the_weight(n, k, block, nested, panel_bytes):
    """Every row once, in order, to the bit, no panel larger than it need be."""
    w, dense = quantised(torch.randn(n, k, device=DEVICE), block, nested)
    # scales of any shape
    w = w._replace(absmax=w.absmax[None], nested_absmax=w.nested_absmax[None] if nested else None)
    found = list(row_panels(w, torch.float32, panel_bytes))
    assert [first for first, *_ in found] == [0, *(end for _, end, _ in found[:-1])] and found[-1][1] == n
    assert torch.equal(torch.cat([part.dense(torch.float32) for *_, part in found]), dense)
    unit = block * (256 if nested else 1)
    assert all(4 * k * (end - first) <= max(panel_bytes, 4 * k * unit) for first, end, _ in found)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("k", [2304, 4096, 5120, 5376, 11008, 14336, 28672, 53248])
def test_panels_of_rows_that_fill_a_cache_begin_with_a_tile_of_the_product(k, nested):
    """Else a part of a tile is left to each, and y and scales lie at addresses that are no multiples of 16 bytes."""
    n, meta = 3 * PANEL_BYTES // (2 * k), torch.device("meta")
    absmax = torch.empty(n * k // 64, dtype=torch.uint8 if nested else torch.float32, device=meta)
    second = (torch.empty(-(-n * k // 2**14), device=meta), torch.empty((), device=meta)) if nested else (None, None)
    w = Packed(torch.empty(n * k // 2, 1, dtype=torch.uint8, device=meta), absmax, *second, (n, k), 64, 256)
    found = list(row_panels(w, torch.bfloat16, PANEL_BYTES))
    assert len(found) > 2 and not any(first % TILE_OF_Y for first, *_ in found)
    assert not nested or not any(first * k // (64 * 256) % 4 for first, *_ in found)
    assert all(2 * k * (end - first) <= PANEL_BYTES for first, end, _ in found)


@given(
    st.integers(1, 40),
    many_columns,
    block_sizes,
    st.booleans(),
    st.integers(1, 100_000),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_panels_of_columns_put_together_are_the_weight(n, k, block, nested, panel_bytes, dtype):
    """Every column once, in order, to the bit, no panel larger than it need be."""
    w, dense = quantised(torch.randn(n, k, device=DEVICE).to(dtype), block, nested)
    found = list(column_panels(w, dtype, panel_bytes))
    assert [first for first, *_ in found] == [0, *(end for _, end, _ in found[:-1])] and found[-1][1] == k
    assert torch.equal(torch.cat([part for *_, part in found], 1), dense)
    assert all(part.nbytes <= max(panel_bytes, n * 512 * dtype.itemsize) for *_, part in found)


@given(st.sampled_from([1, 7]), many_columns, ranks, dtype_pairs, st.booleans(), dropouts, paths, seeds)
def test_nf4_backward_kernels_in_panels_of_columns_match_the_formula(n, k, r, dtypes, nested, dropout, path, seed):
    m = MOST_TOKENS + 1
    x, weight, _, lora_a, lora_b = linear_operands(m, n, k, r, *dtypes, seed, DEVICE)
    w, dense = quantised(weight, 64, nested)
    d_y = values(m * n, dtypes[0], 1.0, seed + 1).view(m, n).to(DEVICE)
    hidden = values(m * r, dtypes[1], 1.0, seed + 2).view(m, r).to(DEVICE)
    rest = (lora_a, lora_b, hidden, -0.7, dropout, SEED)
    # panels as small as they can be
    d_x, *others = launch_nf4_lora_linear_backward(d_y, x, *w, *rest, (True,) * 4, path, panel_bytes=1)
    check_backward((d_x, None, *others), d_y, x, dense, *rest)


@given(st.sampled_from([1, 7]), many_columns, paths, st.sampled_from([1, 2**20]), seeds)
def test_nf4_input_gradient_is_added_to_what_is_there(n, k, path, panel_bytes, seed):
    m, r = MOST_TOKENS + 1, 3
    x, weight, _, lora_a, _ = linear_operands(m, n, k, r, torch.bfloat16, torch.bfloat16, seed, DEVICE)
    w, dense = quantised(weight, 64, True)
    d_y = values(m * n, torch.bfloat16, 1.0, seed + 1).view(m, n).to(DEVICE)
    d_s = values(m * r, torch.bfloat16, 1.0, seed + 2).view(m, r).to(DEVICE)
    total = x.clone()
    assert packed_input_gradient(d_y, w, d_s, lora_a, path=path, total=total, panel_bytes=panel_bytes) is total
    g, w64, s64, a64, start = wide(d_y, dense, d_s, lora_a, x)
    begun = start + s64 @ a64
    exact = begun + g @ w64
    magnitude = start.abs() + s64.abs() @ a64.abs() + g.abs() @ w64.abs()
    # what was there with the low-rank part may be rounded before the product is added
    u = torch.finfo(torch.bfloat16).eps / 2
    bound = u * (begun.abs() + exact.abs()) + 2 * UNIT_FP32 * (n + r + 1) ** 0.5 * magnitude
    assert_within_bound(total.cpu(), exact, bound)


@pytest.mark.parametrize("needs", [*itertools.product((False, True), repeat=4)], ids=str)
@pytest.mark.parametrize(("m", "dropout"), [(5, 0.0), (5, 0.5), (70, 0.0), (70, 0.5)])
def test_nf4_lora_linear_backward_kernels_make_just_what_is_needed(needs, m, dropout):
    x, weight, _, lora_a, lora_b = linear_operands(m, 20, 40, 4, torch.bfloat16, torch.float32, 0, DEVICE)
    w, dense = quantised(weight, 64, True)
    d_y, hidden = torch.randn(m, 20, device=DEVICE).bfloat16(), torch.randn(m, 4, device=DEVICE)
    rest = (lora_a, lora_b, hidden, 0.5, dropout, SEED)
    d_x, *others = launch_nf4_lora_linear_backward(d_y, x if needs[2] else None, *w, *rest, needs)
    for got, need in zip((d_x, *others), needs, strict=True):
        assert (got is not None) == need
    d_x, *others = (g if need else None for g, need in zip((d_x, *others), needs, strict=True))
    check_backward((d_x, None, *others), d_y, x, dense, *rest)


@pytest.mark.parametrize("path", ["fused", "library"])
def test_every_panel_of_rows_has_its_own_part_of_the_bias(path):
    m, n, k, r = 70, 300, 64, 4
    x, weight, bias, lora_a, lora_b = linear_operands(m, n, k, r, torch.float32, torch.float32, 0, DEVICE)
    w, dense = quantised(weight, 64, True)
    assert len(list(row_panels(w, torch.float32, 1))) > 1
    y, hidden = launch_nf4_lora_linear(x, *w, bias, lora_a, lora_b, 0.5, 0.0, SEED, path, panel_bytes=1)
    check_forward(y, x, dense, bias, lora_a, lora_b, 0.5, 0.0, SEED, hidden, "either")


@pytest.mark.parametrize("m", [3, 70])
@pytest.mark.parametrize("spread", ["columns", "transposed"])
def test_nf4_lora_linear_kernels_take_any_strides(m, spread):
    operands = linear_operands(m, 21, 72, 5, torch.bfloat16, torch.bfloat16, 0, DEVICE)
    x, weight, bias, lora_a, lora_b = operands
    w, dense = quantised(weight, 32, True)
    loose = [
        t.repeat_interleave(2, -1)[..., ::2] if spread == "columns" else t.T.contiguous().T for t in (x, lora_a, lora_b)
    ]
    scattered = w._replace(codes=w.codes.repeat_interleave(2, 0)[::2], absmax=w.absmax.repeat_interleave(2)[::2])
    bias = bias.repeat_interleave(3)[::3]
    y, hidden = launch_nf4_lora_linear(loose[0], *scattered, bias, *loose[1:], 0.5, 0.3, SEED)
    check_forward(y, x, dense, bias, lora_a, lora_b, 0.5, 0.3, SEED, hidden, "either")
    d_y = torch.randn(21, m, device=DEVICE).bfloat16().T
    rest = (*loose[1:], hidden.T.contiguous().T, 0.5, 0.3, SEED)
    d_x, *others = launch_nf4_lora_linear_backward(d_y, loose[0], *scattered, *rest, (True,) * 4)
    check_backward((d_x, None, *others), d_y, loose[0], dense, *rest)


@pytest.mark.parametrize("m", [3, 70])
@pytest.mark.parametrize("nested_block", [4, 100, 512])
def test_nf4_lora_linear_kernels_take_any_second_level_block(m, nested_block, monkeypatch):
    """The bits of the same scales, given plain."""
    # panels as small as they can be
    monkeypatch.setattr("lora_core.kernels.nf4_lora_linear.size_of_panels", lambda x: 1)
    x, weight, bias, lora_a, lora_b = linear_operands(m, 21, 600, 5, torch.bfloat16, torch.bfloat16, 0, DEVICE)
    codes, absmax = torch.ops.lora_core.nf4_quantize(weight, 64)
    offset = absmax.mean()
    nested = double.quantize_absmax(absmax, offset, nested_block)
    plain = double.dequantize_absmax(*nested, offset, nested_block)
    d_y = torch.randn(m, 21, device=DEVICE).bfloat16()
    runs = []
    for scales in ((*nested, offset), (plain, None, None)):
        w = Packed(codes, *scales, (21, 600), 64, nested_block)
        y, hidden = launch_nf4_lora_linear(x, *w, bias, lora_a, lora_b, 0.5, 0.3, SEED)
        rest = (lora_a, lora_b, hidden, 0.5, 0.3, SEED, (True,) * 4)
        grads = launch_nf4_lora_linear_backward(d_y, x, *w, *rest)
        norm = launch_nf4_dora_norm(*w, torch.bfloat16, lora_a, lora_b, 0.5)
        dense = launch_nf4_columns(as_read(w), 512, 88, torch.bfloat16)
        tensors, formats = flatten([w, w])
        adapters, drop = ([lora_a] * 2, [lora_b] * 2), ([0.5] * 2, [0.3] * 2, [SEED] * 2)
        *ys, both = launch_lora_linears(x, tensors, formats, [bias] * 2, *adapters, *drop)
        together = launch_lora_linears_backward([d_y] * 2, x, tensors, formats, *adapters, both, *drop, True, True)
        runs.append((y, hidden, *grads, norm, dense, *ys, *together))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("m", [9, 150])
def test_nf4_lora_linear_kernels_give_the_same_bits_twice_and_change_no_operand(m):
    x, weight, bias, lora_a, lora_b = linear_operands(m, 70, 600, 9, torch.bfloat16, torch.bfloat16, 0, DEVICE)
    w, _ = quantised(weight, 64, True)
    operands = (x, bias, lora_a, lora_b, *w[:4])
    before = [t.clone() for t in operands]
    d_y = torch.randn(m, 70, device=DEVICE).bfloat16()
    runs = []
    for _ in range(2):
        y, hidden = launch_nf4_lora_linear(x, *w, bias, lora_a, lora_b, 0.5, 0.3, SEED)
        rest = (lora_a, lora_b, hidden, 0.5, 0.3, SEED, (True,) * 4)
        runs.append((y, hidden, *launch_nf4_lora_linear_backward(d_y, x, *w, *rest)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(operands, before, strict=True))


@pytest.mark.parametrize("m", [2, 70])
@pytest.mark.parametrize("part", ["base", "update"])
def test_nf4_lora_linear_kernel_bound_rejects_a_result_1_percent_off(m, part):
    x, weight, _, lora_a, lora_b = linear_operands(m, 200, 64, 8, torch.bfloat16, torch.bfloat16, 0, DEVICE)
    w, dense = quantised(weight, 64, True)
    if part == "update":
        dense, scaling = torch.zeros_like(dense), 0.505
        w = w._replace(absmax=torch.zeros(len(w.absmax), device=DEVICE), nested_absmax=None, nested_offset=None)
    else:
        lora_b, scaling = torch.zeros_like(lora_b), 0.5
        w = w._replace(nested_absmax=w.nested_absmax * 1.01, nested_offset=w.nested_offset * 1.01)
    y, _ = launch_nf4_lora_linear(x, *w, None, lora_a, lora_b, scaling, 0.0, None)
    with pytest.raises(AssertionError, match="rounding bound|rms"):
        check_forward(y, x, dense, None, lora_a, lora_b, 0.5, rounded="none" if m == 2 else "update")


@pytest.mark.parametrize("lead", [(), (0,), (2, 3), (2, 50)], ids=str)
def test_nf4_lora_linear_kernels_take_any_leading_dimensions_and_no_adapter(lead):
    x = torch.randn(*lead, 40, device=DEVICE)
    w, dense = quantised(torch.randn(6, 40, device=DEVICE), 64, True)
    none = x.new_empty(0, 40), x.new_empty(6, 0)
    y, hidden = launch_nf4_lora_linear(x, *w, None, *none, 0.0, 0.0, None)
    assert y.shape == (*lead, 6) and hidden.shape[1] == 0
    check_forward(y, x, dense, None, *none, 0.0, rounded="either")
    rest = (*none, hidden, 0.0, 0.0, None)
    d_x, *_ = launch_nf4_lora_linear_backward(torch.ones_like(y), x, *w, *rest, (True, True, True, True))
    assert d_x.shape == x.shape


def test_nf4_lora_linear_kernels_run_float64_on_the_reference():
    x, weight, bias, lora_a, lora_b = linear_operands(4, 5, 40, 2, torch.float64, torch.float64, 0, DEVICE)
    q = lc.quantize_nf4(weight.float())
    w, dense = Packed.of(q), q.dequantize(torch.float64)
    y, hidden = launch_nf4_lora_linear(x, *w, bias, lora_a, lora_b, 0.5, 0.2, SEED)
    check_forward(y, x, dense, bias, lora_a, lora_b, 0.5, 0.2, SEED, hidden, "either")
    rest = (lora_a, lora_b, hidden, 0.5, 0.2, SEED)
    for needs in ((True,) * 4, (False, True, True, True)):
        d_x, *others = launch_nf4_lora_linear_backward(torch.ones_like(y), x, *w, *rest, needs)
        check_backward((d_x if needs[0] else None, None, *others), torch.ones_like(y), x, dense, *rest)
