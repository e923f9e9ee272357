"""swiglu: the kernels on a GPU or in the interpreter, forward and backward, within a bound of their roundings."""

import functools

import elementwise_bounds as bounds
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, dtypes, laid_out, layouts, seeds, values

from lora_core.kernels.swiglu import ELEMENTS, launch_swiglu, launch_swiglu_backward
from lora_core.reference import swiglu as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
rows = st.sampled_from([1, 2, 7, 17])
# within a program, just over one, rows that are read where they lie: multiples of 16 and others
columns = st.sampled_from([1, 7, 48, 131, ELEMENTS, ELEMENTS + 3, ELEMENTS + 16])
# of the gate: past 88 its exponential is no float32, and past 104 its sigmoid neither
scales = st.sampled_from([0.0, 1e-40, 1e-3, 1.0, 30.0, 1e4])


# the kernels make an exponential of a power of two
check = functools.partial(bounds.check_swiglu, powers_of_two=True)
check_backward = functools.partial(bounds.check_swiglu_backward, powers_of_two=True)


@given(rows, columns, dtypes, scales, scales, st.tuples(layouts, layouts, layouts), st.integers(0, 4), seeds)
def test_swiglu_kernels_match_the_reference(m, n, dtype, of_gate, of_up, lie, begin, seed):
    made = (values(m * n + begin, dtype, s, seed + i).to(DEVICE) for i, s in enumerate((of_gate, of_up, 1.0)))
    gate, up, d_y = (laid_out(t[begin:].view(m, n), own) for t, own in zip(made, lie, strict=True))
    check(launch_swiglu(gate, up), gate, up)
    check_backward(*launch_swiglu_backward(d_y, gate, up), d_y, gate, up)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_kernels_bounds_reject_a_result_1_percent_off(dtype):
    gate, up, d_y = (torch.randn(3, 500, device=DEVICE).to(dtype) for _ in range(3))
    with pytest.raises(AssertionError, match="rounding bound|rms"):
        check(launch_swiglu(gate, up) * 1.01, gate, up)
    for wrong in ((1.01, 1), (1, 1.01)):
        grads = launch_swiglu_backward(d_y, gate, up)
        with pytest.raises(AssertionError, match="rounding bound|rms"):
            check_backward(*(g * factor for g, factor in zip(grads, wrong, strict=True)), d_y, gate, up)


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_kernels_read_halves_of_one_product_where_they_lie(dtype, extra, caplog):
    n = ELEMENTS + extra
    gate, up = torch.randn(2, 3, 2 * n, device=DEVICE).to(dtype).chunk(2, -1)
    d_y = torch.randn(2, 3, n, device=DEVICE).to(dtype)
    with caplog.at_level("DEBUG", "lora_core.kernels"):
        got = (launch_swiglu(gate, up), *launch_swiglu_backward(d_y, gate, up))
    assert caplog.messages == ["swiglu: rows", "swiglu_backward: rows"]
    apart = gate.contiguous(), up.contiguous()
    assert all(map(torch.equal, got, (launch_swiglu(*apart), *launch_swiglu_backward(d_y, *apart))))


def test_swiglu_kernels_copy_what_has_no_rows_give_the_same_bits_twice_and_change_nothing(caplog):
    loose = [torch.randn(ELEMENTS, 2, 5, device=DEVICE).permute(2, 1, 0) for _ in range(3)]
    before = [t.clone() for t in loose]
    with caplog.at_level("DEBUG", "lora_core.kernels"):
        grads = launch_swiglu_backward(*loose)
    assert caplog.messages == ["swiglu_backward: rows, copies 3 operands"]
    check_backward(*grads, *loose)
    assert all(map(torch.equal, grads, launch_swiglu_backward(*loose)))
    assert all(map(torch.equal, loose, before))


def test_swiglu_kernels_take_a_gradient_that_is_one_number_for_all():
    """As that of a sum is."""
    gate, up = (torch.randn(3, ELEMENTS + 16, device=DEVICE) for _ in range(2))
    d_y = torch.ones((), device=DEVICE).expand(gate.shape)
    check_backward(*launch_swiglu_backward(d_y, gate, up), d_y, gate, up)


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (3, 0), (2, 0, ELEMENTS), (1,), (2, 3, 1, 5)], ids=str)
def test_swiglu_kernels_take_any_shape(shape):
    d_y, gate, up = (torch.randn(shape, device=DEVICE) for _ in range(3))
    check(launch_swiglu(gate, up), gate, up)
    check_backward(*launch_swiglu_backward(d_y, gate, up), d_y, gate, up)


def test_swiglu_kernels_hand_on_what_is_no_finite_number_as_the_reference_does():
    inf, nan = float("inf"), float("nan")
    gate = torch.tensor([inf, -inf, nan, 1.0, 1.0, 0.0], device=DEVICE)
    up = torch.tensor([1.0, 1.0, 1.0, inf, nan, inf], device=DEVICE)
    d_y = torch.ones_like(up)
    for got, want in (
        (launch_swiglu(gate, up), reference.swiglu(gate, up)),
        *zip(launch_swiglu_backward(d_y, gate, up), reference.backward(d_y, gate, up), strict=True),
    ):
        assert torch.equal(got.isnan(), want.isnan())
        infinite = want.isinf()
        assert torch.equal(got.isinf(), infinite) and torch.equal(got[infinite], want[infinite])


def test_swiglu_runs_float64_on_the_reference(caplog):
    d_y, gate, up = (torch.randn(3, 5, dtype=torch.float64, device=DEVICE) for _ in range(3))
    with caplog.at_level("DEBUG", "lora_core.kernels"):
        assert torch.equal(launch_swiglu(gate, up), reference.swiglu(gate, up))
        grads = launch_swiglu_backward(d_y, gate, up)
    assert all(map(torch.equal, grads, reference.backward(d_y, gate, up)))
    assert caplog.messages == [f"swiglu{direction}: float64, reference" for direction in ("", "_backward")]
