"""rms_norm: the kernels on a GPU or in the interpreter, forward and backward, within a bound of their roundings."""

import elementwise_bounds as bounds
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, dtypes, laid_out, layouts, seeds, sizes, values

from lora_core.kernels.rms_norm import PARTS, TILES, launch_rms_norm, launch_rms_norm_backward
from lora_core.reference import rms_norm as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6
# rows in each of the tiles, whole or not, read many at once or one by one
columns = st.sampled_from([1, 7, 16, 48, 128, 131, 144, 512, 528, 600])
long = [1000, 1024, 1030, 2048, 4096, 8192, 8208]
scales = st.sampled_from([0.0, 1e-3, 1.0, 1e4])


def operands(m, k, dtype, seed, scale=1.0):
    return [
        values(n * k, dtype, s, seed + i).view(n, k).to(DEVICE)
        for i, (n, s) in enumerate(((m, scale), (m, 1.0), (1, 1.0)))
    ]


@given(sizes, columns, dtypes, scales, st.tuples(layouts, layouts), st.booleans(), st.integers(0, 40), seeds)
def test_rms_norm_kernels_match_the_reference(m, k, dtype, scale, lie, need_weight, splits, seed):
    x, d_y, (weight,) = operands(m, k, dtype, seed, scale)
    x, d_y = (laid_out(t, own) for t, own in zip((x, d_y), lie, strict=True))
    made = launch_rms_norm(x, weight, EPS)
    bounds.check_rms_norm(*made, x, weight, EPS)
    grads = launch_rms_norm_backward(d_y, x, weight, made[1], need_weight, splits or None)
    assert (grads[1] is not None) == need_weight
    bounds.check_rms_norm_backward(*grads, d_y, x, weight, made[1])


@pytest.mark.parametrize("k", long)
def test_rms_norm_kernels_of_long_rows_match_the_reference(k):
    x, d_y, (weight,) = operands(3, k, torch.bfloat16, 0)
    made = launch_rms_norm(x, weight, EPS)
    bounds.check_rms_norm(*made, x, weight, EPS)
    for need_weight in (False, True):
        grads = launch_rms_norm_backward(d_y, x, weight, made[1], need_weight)
        assert (grads[1] is not None) == need_weight
        bounds.check_rms_norm_backward(*grads, d_y, x, weight, made[1])


def test_rms_norm_kernels_are_tried_with_rows_past_every_tile():
    for known in TILES.values():
        assert {*known} <= {128, 512, *long} and any(k > max(known) for k in long)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_kernels_bounds_reject_a_result_1_percent_off(dtype):
    x, d_y, (weight,) = operands(40, 131, dtype, 0)
    y, r = launch_rms_norm(x, weight, EPS)
    d_x, d_weight = launch_rms_norm_backward(d_y, x, weight, r, True)
    for wrong in ((y * 1.01, r), (y, r * 1.01)):
        with pytest.raises(AssertionError, match="rounding bound|rms"):
            bounds.check_rms_norm(*wrong, x, weight, EPS)
    for wrong in ((d_x * 1.01, d_weight), (d_x, d_weight * 1.01)):
        with pytest.raises(AssertionError, match="rounding bound|rms"):
            bounds.check_rms_norm_backward(*wrong, d_y, x, weight, r)


@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (2, 1, 3, 64)], ids=str)
def test_rms_norm_kernels_take_any_dimensions_and_strides_and_change_nothing(shape, caplog):
    x, d_y = (torch.randn(*shape, device=DEVICE) for _ in range(2))
    weight = torch.randn(64, device=DEVICE)
    loose = [t.repeat_interleave(2, -1)[..., ::2] for t in (x, d_y)]
    before = [t.clone() for t in (*loose, weight)]
    with caplog.at_level("DEBUG", "lora_core.kernels"):
        y, r = launch_rms_norm(loose[0], weight, EPS)
        grads = launch_rms_norm_backward(loose[1], loose[0], weight, r, True)
    assert len(caplog.messages) == 2 and "copies" not in caplog.text
    bounds.check_rms_norm(y, r, x, weight, EPS)
    bounds.check_rms_norm_backward(*grads, d_y, x, weight, r)
    again = launch_rms_norm(loose[0], weight, EPS), launch_rms_norm_backward(loose[1], loose[0], weight, r, True)
    assert all(map(torch.equal, (y, r, *grads), (*again[0], *again[1])))
    assert all(map(torch.equal, (*loose, weight), before))


def test_rms_norm_kernels_copy_rows_that_lie_in_no_one_distance(caplog):
    """As of query heads that lie head by head."""
    x, d_y = (torch.randn(2, 3, 4, 64, device=DEVICE).transpose(1, 2) for _ in range(2))
    weight = torch.randn(128, device=DEVICE)[::2]
    with caplog.at_level("DEBUG", "lora_core.kernels"):
        made = launch_rms_norm(x, weight, EPS)
        grads = launch_rms_norm_backward(d_y, x, weight, made[1], True)
    assert caplog.messages == ["rms_norm: wide, copies 2 operands", "rms_norm_backward: wide, copies 3 operands"]
    bounds.check_rms_norm(*made, x, weight, EPS)
    bounds.check_rms_norm_backward(*grads, d_y, x, weight, made[1])


@pytest.mark.parametrize("splits", [1, PARTS, PARTS + 1, 5 * PARTS])
def test_rms_norm_kernel_adds_the_parts_of_a_gradient(splits):
    """Some of many parts are of no rows."""
    x, d_y, (weight,) = operands(300, 1040, torch.float32, 0)
    r = launch_rms_norm(x, weight, EPS)[1]
    grads = launch_rms_norm_backward(d_y, x, weight, r, True, splits)
    bounds.check_rms_norm_backward(*grads, d_y, x, weight, r)


def test_rms_norm_kernels_read_nothing_beside_a_row():
    behind = torch.full((3, 64), float("nan"), device=DEVICE)
    behind[:, :33] = 1.0
    x, weight = behind[:, :33], behind[0, :33]
    y, r = launch_rms_norm(x, weight, EPS)
    assert y.isfinite().all() and r.isfinite().all()
    assert all(t.isfinite().all() for t in launch_rms_norm_backward(x, x, weight, r, True))


def test_rms_norm_kernels_of_zeros_and_of_tiny_rows_are_finite():
    """Without eps a row near float32's smallest root has an r whose third power is none."""
    weight = torch.randn(64, device=DEVICE)
    for x, eps in ((torch.zeros(2, 64, device=DEVICE), EPS), (1e-15 * torch.randn(2, 64, device=DEVICE), 0.0)):
        made = launch_rms_norm(x, weight, eps)
        bounds.check_rms_norm(*made, x, weight, eps)
        d_y = torch.randn(2, 64, device=DEVICE)
        bounds.check_rms_norm_backward(
            *launch_rms_norm_backward(d_y, x, weight, made[1], True), d_y, x, weight, made[1]
        )


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)], ids=str)
def test_rms_norm_kernels_take_no_rows(shape):
    x, weight = torch.randn(shape, device=DEVICE), torch.randn(8, device=DEVICE)
    y, r = launch_rms_norm(x, weight, EPS)
    assert y.shape == shape and r.shape == (0,)
    d_x, d_weight = launch_rms_norm_backward(x, x, weight, r, True)
    assert d_x.shape == shape and torch.equal(d_weight, torch.zeros_like(weight))
    assert launch_rms_norm_backward(x, x, weight, r, False)[1] is None


def test_rms_norm_runs_float64_on_the_reference(caplog):
    x, d_y, (weight,) = (t.double() for t in operands(3, 40, torch.float32, 0))
    with caplog.at_level("DEBUG", "lora_core.kernels"):
        y, r = launch_rms_norm(x, weight, EPS)
        grads = launch_rms_norm_backward(d_y, x, weight, r, True)
    assert all(map(torch.equal, (y, r), reference.forward(x, weight, EPS)))
    assert all(map(torch.equal, grads, reference.backward(d_y, x, weight, r, True)))
    assert caplog.messages == [f"rms_norm{direction}: float64, reference" for direction in ("", "_backward")]
