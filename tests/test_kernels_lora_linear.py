"""The kernels of lora_linear and its backward against float64: on a GPU, or on the CPU in Triton's interpreter."""

import itertools
import logging

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from lora_bounds import check_backward, check_forward
from strategies import (
    dropouts,
    dtype_pairs,
    laid_out,
    layouts,
    linear_operands,
    ranks,
    seeds,
    sizes,
    spread,
    values,
    widths,
)
from tolerance import UNIT_FP32, assert_within_bound, assert_within_rounding

from lora_core.kernels.crossover import PATHS
from lora_core.kernels.form import in_wide_loads
from lora_core.kernels.lora_linear import launch_lora_linear, launch_lora_linear_backward
from lora_core.kernels.low_rank import low_rank_linear, low_rank_part
from lora_core.kernels.row_sum import launch_row_sum
from lora_core.kernels.shrink import launch_shrink
from lora_core.kernels.split_sum import launch_split_sum
from lora_core.reference.dropout import keep_mask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED = torch.tensor([2**40 + 77], device=DEVICE)
paths = st.sampled_from(PATHS)
# a library adds its product to the rest, which is in y already
ROUNDED = {"fused": "none", "library": "update"}
scalings = st.sampled_from([0.5, 2.0, -1.7, 0.0])


# all products alike, which a library adds one by one
@example(1, 1, 131, 1, (torch.float32,) * 2, False, 0.0, 0.0, "library", 1_738_130_221, "one element", "one element")
@given(sizes, widths, widths, ranks, dtype_pairs, st.booleans(), scalings, dropouts, paths, seeds, layouts, layouts)
def test_lora_linear_kernels_match_the_formula(m, n, k, r, dtypes, bias, scaling, dropout, path, seed, lie, lie_w):
    x, weight, b, lora_a, lora_b = linear_operands(m, n, k, r, *dtypes, seed, DEVICE)
    x, weight = laid_out(x, lie), laid_out(weight, lie_w)
    operands = (x, weight, b if bias else None, lora_a, lora_b, scaling, dropout, SEED)
    y, hidden = launch_lora_linear(*operands, path=path)
    assert y.dtype == dtypes[0] and hidden.dtype == dtypes[1]
    check_forward(y, *operands, hidden, ROUNDED[path])


# a library's products take no mask and no second dtype: one draw in twelve
@example(17, 33, 48, 8, (torch.float32,) * 2, -1.7, 0.0, "library", 0, "rows")
@given(sizes, widths, widths, ranks, dtype_pairs, scalings, dropouts, paths, seeds, layouts)
def test_lora_linear_backward_kernels_match_the_formula(m, n, k, r, dtypes, scaling, dropout, path, seed, lie):
    x, weight, _, lora_a, lora_b = linear_operands(m, n, k, r, *dtypes, seed, DEVICE)
    # of y.sum() it is one element for all
    d_y = laid_out(values(m * n, dtypes[0], 1.0, seed + 1).view(m, n).to(DEVICE), lie)
    hidden = values(m * r, dtypes[1], 1.0, seed + 2).view(m, r).to(DEVICE)
    rest = (x, weight, lora_a, lora_b, hidden, scaling, dropout, SEED)
    grads = launch_lora_linear_backward(d_y, *rest, (True,) * 5, path=path)
    assert [g.dtype for g in grads] == [dtypes[0]] * 3 + [dtypes[1]] * 2
    check_backward(grads, d_y, *rest)


@pytest.mark.parametrize("needs", [*itertools.product((False, True), repeat=5)], ids=str)
@pytest.mark.parametrize(("r", "dropout"), [(4, 0.0), (4, 0.5), (40, 0.0), (40, 0.5)])
def test_lora_linear_backward_kernels_make_just_what_is_needed(needs, r, dropout):
    """Every subset, by one read of dL/dy (r = 4) and by two (r = 40): the same as all together, the rest None."""
    x, weight, _, lora_a, lora_b = linear_operands(9, 20, 35, r, torch.bfloat16, torch.bfloat16, 0, DEVICE)
    d_y, hidden = torch.randn(9, 20, device=DEVICE).bfloat16(), torch.randn(9, r, device=DEVICE).bfloat16()
    run = (d_y, x, weight, lora_a, lora_b, hidden, 0.5, dropout, SEED)
    grads = launch_lora_linear_backward(*run, needs)
    for got, need in zip(grads, needs, strict=True):
        assert (got is not None) == need
    wanted = [g if need else None for g, need in zip(grads, needs, strict=True)]
    check_backward(wanted, d_y, x, weight, lora_a, lora_b, hidden, 0.5, dropout, SEED)


@given(sizes, st.sampled_from([1, 63, 64, 65, 300]), ranks, dtype_pairs, dropouts, st.integers(1, 5), seeds)
def test_shrink_kernel_splits_its_sum_without_a_trace(m, k, r, dtypes, dropout, splits, seed):
    """However the sum over K is cut, the product is the formula's."""
    x, _, _, lora_a, lora_b = linear_operands(m, 1, k, r, *dtypes, seed, DEVICE)
    s = launch_shrink(x, lora_a, dropout, SEED, -0.7, splits)
    wide = x.double().cpu()
    keep = keep_mask(SEED.cpu(), m, k, dropout) / (1 - dropout)
    truth = -0.7 * (wide * keep) @ lora_a.double().cpu().T
    magnitude = 0.7 * (wide * keep).abs() @ lora_a.double().cpu().T.abs()
    unit = torch.finfo(dtypes[1]).eps / 2
    assert_within_bound(s.cpu(), truth, unit * truth.abs() + 2 * UNIT_FP32 * (k + splits + 2) ** 0.5 * magnitude)


def test_row_sum_kernel_makes_the_gradient_of_a_bias_without_ranks():
    d_y = torch.randn(5, 7, device=DEVICE)
    found = launch_row_sum(d_y, d_y[:, :0], bias=True)
    assert found.product.shape == (7, 0)
    assert_within_rounding(found.d_bias, lambda g: g.sum(0), d_y, depth=5)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_shrink_kernel_takes_an_a_stored_by_columns(dropout):
    x, _, _, lora_a, _ = linear_operands(20, 1, 64, 5, torch.float16, torch.float16, 0, DEVICE)
    s = launch_shrink(x, lora_a.T.contiguous().T, dropout, SEED)
    wide, a = x.double().cpu() * keep_mask(SEED.cpu(), 20, 64, dropout) / (1 - dropout), lora_a.double().cpu()
    truth, magnitude = wide @ a.T, wide.abs() @ a.T.abs()
    unit = torch.finfo(torch.float16).eps / 2
    assert_within_bound(s.cpu(), truth, unit * truth.abs() + 2 * UNIT_FP32 * 66**0.5 * magnitude)


@given(st.sampled_from([1, 64, 65, 200]), sizes, ranks, dtype_pairs, dropouts, st.integers(1, 4), st.booleans(), seeds)
def test_row_sum_kernel_splits_its_sums_without_a_trace(m, c, r, dtypes, dropout, splits, transposed, seed):
    d = values(m * c, dtypes[0], 1.0, seed).view(m, c).to(DEVICE)
    t = values(m * r, dtypes[1], 1.0, seed + 1).view(m, r).to(DEVICE)
    dropout = dropout if transposed else 0.0
    product = launch_row_sum(d, t, 0.3, dropout, SEED, transposed=transposed, splits=splits).product
    assert product.is_contiguous() and product.shape == ((r, c) if transposed else (c, r))
    masked = d.double().cpu() * keep_mask(SEED.cpu(), m, c, dropout) / (1 - dropout)
    truth, magnitude = (0.3 * a.T @ b for a, b in ((masked, t.double().cpu()), (masked.abs(), t.double().cpu().abs())))
    got = product.T if transposed else product
    unit = torch.finfo(dtypes[1]).eps / 2
    assert_within_bound(got.cpu(), truth, unit * truth.abs() + 2 * UNIT_FP32 * (m + splits + 2) ** 0.5 * magnitude)


@given(
    st.sampled_from([1, 64, 65]),
    st.sampled_from([1, 129, 200]),
    st.integers(1, 16),
    dtype_pairs,
    st.integers(1, 3),
    seeds,
)
def test_row_sum_kernel_adds_the_gradient_of_hidden_over_columns(m, c, r, dtypes, splits, seed):
    """Columns of several programs: each writes a part of its own, in each range of rows."""
    d = values(m * c, dtypes[0], 1.0, seed).view(m, c).to(DEVICE)
    t = values(m * r, dtypes[1], 1.0, seed + 1).view(m, r).to(DEVICE)
    lora_b = values(c * r, dtypes[1], 1.0, seed + 2).view(c, r).to(DEVICE)
    got = launch_row_sum(d, t, 0.3, shrink_by=lora_b, splits=splits).d_s
    wide, low = d.double().cpu(), lora_b.double().cpu()
    truth, magnitude = 0.3 * wide @ low, 0.3 * wide.abs() @ low.abs()
    unit = torch.finfo(dtypes[1]).eps / 2
    assert_within_bound(got.cpu(), truth, unit * truth.abs() + 2 * UNIT_FP32 * (c + 4) ** 0.5 * magnitude)


@given(st.integers(1, 9), st.integers(1, 1500), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans(), seeds)
def test_split_sum_kernel_adds_in_order(parts, size, dtype, with_add, seed):
    """The bits of adding the parts one after the other: what makes a result repeatable."""
    part = values(parts * size, torch.float32, 1.0, seed, mixed=True).view(parts, size).to(DEVICE)
    add = values(size, dtype, 1.0, seed).to(DEVICE) if with_add else None
    want = torch.zeros(size, device=DEVICE)
    for p in part:
        want = want + p
    want = want * 1.5
    # a GPU may fuse the product with what is added: one rounding the fewer
    once = want if add is None else want + add.float()
    got = launch_split_sum(part, dtype, 1.5, add)
    if add is None or DEVICE == "cpu":
        assert torch.equal(got, once.to(dtype))
    else:
        unit = torch.finfo(dtype).eps / 2
        bound = unit * once.double().abs() + UNIT_FP32 * (want.double().abs() + once.double().abs())
        assert_within_bound(got.cpu(), once.double().cpu(), bound.cpu())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("r", [0, 3])
@pytest.mark.parametrize(("m", "n", "k"), [(9, 20, 33), (70, 32, 48)])
def test_a_product_can_be_added_to_a_total(path, dropout, r, m, n, k):
    """As the backward of several layers adds theirs up, in place."""
    x, weight, _, _, lora_b = linear_operands(m, n, k, max(r, 1), torch.float32, torch.float32, 0, DEVICE)
    hidden, lora_b = torch.randn(m, r, device=DEVICE), lora_b[:, :r]
    total, before = (torch.randn(m, n, generator=torch.Generator().manual_seed(1)).to(DEVICE) for _ in range(2))
    y = low_rank_linear(x, weight, None, hidden, lora_b, 0.5, dropout, SEED, path, total)
    assert y is total
    x, weight, hidden, lora_b, before = (t.double().cpu() for t in (x, weight, hidden, lora_b, before))
    keep = keep_mask(SEED.cpu(), m, n, dropout).double()
    truth = before + x @ weight.T + 0.5 * keep * (hidden @ lora_b.T)
    magnitude = before.abs() + x.abs() @ weight.T.abs() + 0.5 * hidden.abs() @ lora_b.T.abs()
    assert_within_bound(y.cpu(), truth, 2 * UNIT_FP32 * (k + r + 2) ** 0.5 * magnitude)


# k is the rank here, and ranks are walked in steps of sixteen: more columns would take minutes in the interpreter
sides = st.sampled_from([1, 3, 16, 17, 64, 65])


@given(sides, sides, st.sampled_from([0.1, 0.5, 0.9]), st.integers(0, 2**62), dtype_pairs)
def test_dropout_in_the_kernels_is_the_references_mask(m, k, p, seed, dtypes):
    """Ones through the identity show the mask itself, in the forward and in both gradients that use it."""
    seed = torch.tensor([seed], device=DEVICE)
    dtype, low = dtypes
    keep = keep_mask(seed.cpu(), m, k, p)
    x, eye = torch.ones(m, k, device=DEVICE, dtype=dtype), torch.eye(k, device=DEVICE)
    s = launch_shrink(x, eye.to(low), p, seed)
    assert torch.equal(s.cpu() != 0, keep)
    d_a = launch_row_sum(x, torch.eye(m, device=DEVICE).to(low), 1.0, p, seed, transposed=True).product
    assert torch.equal(d_a.cpu() != 0, keep)
    for path in PATHS:
        # as many outputs as columns of x: dL/dS is ones where dL/dy and B are
        d_y, weight = torch.ones(m, k, device=DEVICE, dtype=dtype), torch.zeros(k, k, device=DEVICE, dtype=dtype)
        hidden = torch.zeros(m, k, device=DEVICE, dtype=low)
        rest = (d_y, None, weight, eye.to(low), eye.to(low), hidden, 1.0, p, seed)
        d_x = launch_lora_linear_backward(*rest, (True, False, False, False, False), path=path)[0]
        assert torch.equal(d_x.cpu() != 0, keep)


@given(sizes, st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_lora_linear_kernels_take_any_strides(m, wider, dtype):
    x, weight, bias, lora_a, lora_b = linear_operands(m, 21, 35, 5, dtype, dtype, m, DEVICE)
    spread = [
        t.repeat_interleave(2, -1)[..., ::2] if wider else t.T.contiguous().T for t in (x, weight, lora_a, lora_b)
    ]
    bias = bias.repeat_interleave(3)[::3]
    d_y = torch.randn(21, m, device=DEVICE).to(dtype).T
    for path in PATHS:
        y, hidden = launch_lora_linear(spread[0], spread[1], bias, *spread[2:], 0.5, 0.3, SEED, path=path)
        check_forward(y, x, weight, bias, lora_a, lora_b, 0.5, 0.3, SEED, hidden, "either")
        rest = (*spread, hidden.T.contiguous().T if wider else hidden, 0.5, 0.3, SEED)
        grads = launch_lora_linear_backward(d_y, *rest, (True,) * 5, path=path)
        check_backward(grads, d_y, *rest)


@pytest.mark.parametrize("operand", ["x", "weight"])
def test_low_rank_matmul_kernel_takes_strides_whose_steps_pass_two_to_the_31st(operand):
    """A view of which only the elements read take memory: one column for every 16 MiB."""
    x, weight, bias, lora_a, lora_b = linear_operands(4, 20, 130, 3, torch.float16, torch.float16, 0, DEVICE)
    narrow = {"x": x, "weight": weight}[operand]
    far = spread(narrow, 2**24, 1)
    x, weight = (far, weight) if operand == "x" else (x, far)
    y, hidden = launch_lora_linear(x, weight, bias, lora_a, lora_b, 0.5, 0.0, None, path="fused")
    check_forward(y, x, weight, bias, lora_a, lora_b, 0.5, hidden=hidden, rounded="either")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(131, 208, 16), (208, 144, 16), (1100, 144, 16), (131, 200, 5)])
def test_low_rank_matmul_kernel_walks_every_tile(m, n, k, dtype):
    """Several tiles each way, in groups that are full and in one that is not: an element left out would be NaN."""
    x, weight, bias, lora_a, lora_b = linear_operands(m, n, k, 3, dtype, dtype, 0, DEVICE)
    y, hidden = launch_lora_linear(x, weight, bias, lora_a, lora_b, 0.5, 0.0, None, path="fused")
    check_forward(y, x, weight, bias, lora_a, lora_b, 0.5, hidden=hidden, rounded="either")


def test_operands_of_single_elements_are_told_from_those_of_wide_loads():
    """By the contiguous dimension, the size along it, the stride of the other and the address."""
    whole = torch.zeros(48, 64, dtype=torch.bfloat16, device=DEVICE)
    assert all(in_wide_loads(t) for t in (whole, whole[:5], whole[:, :48], whole[:, :0])) and in_wide_loads(whole.T, 0)
    odd = (whole[:, :40], whole[:, 1:33], whole[::2, ::2], whole.T[:, :5].T[:, :5], torch.zeros(16, 24, device=DEVICE))
    assert not any(in_wide_loads(t) for t in odd)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_weight_stored_by_columns_is_loaded_16_bytes_at_once(dropout, caplog):
    """As transformers' Conv1D has it: B, which is small, is laid out as W is."""
    x, weight, bias, lora_a, lora_b = linear_operands(24, 48, 32, 3, torch.bfloat16, torch.bfloat16, 0, DEVICE)
    weight = weight.T.contiguous().T
    with caplog.at_level(logging.DEBUG, "lora_core.kernels"):
        y, hidden = launch_lora_linear(x, weight, bias, lora_a, lora_b, 0.5, dropout, SEED, path="fused")
        rest = (x, weight, lora_a, lora_b, hidden, 0.5, dropout, SEED)
        grads = launch_lora_linear_backward(torch.ones_like(y), *rest, (True,) * 5, path="fused")
    check_forward(y, x, weight, bias, lora_a, lora_b, 0.5, dropout, SEED, hidden, rounded="either")
    check_backward(grads, torch.ones_like(y), *rest)
    assert [m for m in caplog.messages if m.startswith("low_rank_matmul")] == ["low_rank_matmul: loads of 16 bytes"] * 2


def test_an_a_whose_rows_lie_apart_is_loaded_as_they_lie():
    """Part of a wider matrix, whose rows begin at no multiple of 16 elements; of all others they do."""
    x, weight, bias, _, lora_b = linear_operands(24, 48, 32, 4, torch.bfloat16, torch.bfloat16, 0, DEVICE)
    lora_a = torch.randn(4, 40, device=DEVICE).bfloat16()[:, :32]
    y, hidden = launch_lora_linear(x, weight, bias, lora_a, lora_b, 0.5, 0.0, None, path="fused")
    rest = (x, weight, lora_a, lora_b, hidden, 0.5, 0.0, None)
    grads = launch_lora_linear_backward(torch.ones_like(y), *rest, (True,) * 5, path="fused")
    check_forward(y, x, weight, bias, lora_a, lora_b, 0.5, hidden=hidden, rounded="either")
    check_backward(grads, torch.ones_like(y), *rest)


def test_an_update_without_a_product_is_loaded_16_bytes_at_once(caplog):
    """What a W without columns has for strides says nothing."""
    x, _, bias, _, lora_b = linear_operands(24, 48, 32, 16, torch.bfloat16, torch.bfloat16, 0, DEVICE)
    hidden = torch.ones(24, 16, dtype=torch.bfloat16, device=DEVICE)
    with caplog.at_level(logging.DEBUG, "lora_core.kernels"):
        low_rank_part(x, 48, bias, hidden, lora_b, 0.5)
    assert "low_rank_matmul: loads of 16 bytes" in caplog.messages


@pytest.mark.parametrize("lead", [(), (0,), (2, 0), (2, 3, 4)], ids=str)
def test_lora_linear_kernels_take_any_leading_dimensions(lead):
    x, weight, bias, lora_a, lora_b = linear_operands(24, 6, 32, 3, torch.float32, torch.float32, 0, DEVICE)
    x = x[: max(1, torch.Size(lead).numel())].reshape(*lead, 32) if 0 not in lead else x[:0].reshape(*lead, 32)
    y, hidden = launch_lora_linear(x, weight, bias, lora_a, lora_b, 0.5, 0.0, None)
    assert y.shape == (*lead, 6)
    check_forward(y, x, weight, bias, lora_a, lora_b, 0.5, hidden=hidden, rounded="either")
    grads = launch_lora_linear_backward(
        torch.ones_like(y), x, weight, lora_a, lora_b, hidden, 0.5, 0.0, None, (True,) * 5
    )
    assert [g.shape for g in grads] == [t.shape for t in (x, weight, bias, lora_a, lora_b)]
    assert 0 not in lead or all(bool((g == 0).all()) for g in grads)


@pytest.mark.parametrize("path", PATHS)
def test_lora_linear_kernels_give_the_same_bits_twice_and_change_no_operand(path):
    operands = linear_operands(150, 70, 90, 9, torch.bfloat16, torch.bfloat16, 0, DEVICE)
    before = [t.clone() for t in operands]
    d_y = torch.randn(150, 70, device=DEVICE).bfloat16()
    runs = []
    for _ in range(2):
        y, hidden = launch_lora_linear(*operands, 0.5, 0.3, SEED, path=path)
        x, weight, _, lora_a, lora_b = operands
        rest = (x, weight, lora_a, lora_b, hidden, 0.5, 0.3, SEED, (True,) * 5)
        runs.append((y, hidden, *launch_lora_linear_backward(d_y, *rest, path=path)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(operands, before, strict=True))


@pytest.mark.parametrize("part", ["base", "update"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora_linear_kernel_bound_rejects_a_result_1_percent_off(part, dtype):
    x, weight, bias, lora_a, lora_b = linear_operands(64, 40, 33, 8, dtype, dtype, 0, DEVICE)
    zero = torch.zeros_like
    right = (
        (x, zero(weight), None, lora_a, lora_b, 0.5)
        if part == "update"
        else (x, weight, None, lora_a, zero(lora_b), 0.5)
    )
    wrong = (*right[:5], 0.505) if part == "update" else (x, weight * 1.01, *right[2:])
    y, _ = launch_lora_linear(*wrong, 0.0, None, path="fused")
    with pytest.raises(AssertionError, match="rounding bound|rms"):
        check_forward(y, *right, rounded="none")


def test_lora_linear_kernels_run_float64_on_the_reference():
    operands = linear_operands(4, 5, 6, 2, torch.float64, torch.float64, 0, DEVICE)
    y, hidden = launch_lora_linear(*operands, 0.5, 0.2, SEED)
    assert y.dtype == torch.float64
    x, weight, _, lora_a, lora_b = operands
    rest = (x, weight, lora_a, lora_b, hidden, 0.5, 0.2, SEED)
    grads = launch_lora_linear_backward(torch.ones_like(y), *rest, (True,) * 5)
    check_forward(y, *operands, 0.5, 0.2, SEED, hidden)
    check_backward(grads, torch.ones_like(y), *rest)
