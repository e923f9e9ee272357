"""rms_norm, swiglu and rotary on a CPU, by compiled loops and by the reference: within the bounds of their formulas."""

import contextlib

import elementwise_bounds as bounds
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import laid_out, layouts, seeds, values, widths

from lora_core.cpu import chunks, compiled, rms_norm, rotary, swiglu

dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
rows = st.sampled_from([1, 2, 3, 17, 64, 131])
ways = st.sampled_from(["loops", "reference"])
# subnormal ones, and gates whose exponential is no float32
scales = st.sampled_from([0.0, 1e-40, 1e-3, 1.0, 30.0, 1e4])


@pytest.fixture(autouse=True)
def _few_rows_a_range(monkeypatch):
    """Let ranges of rows begin and end inside these small operands."""
    for module in (rms_norm, rotary, swiglu):
        monkeypatch.setattr(module, "SHARED", 64)


@contextlib.contextmanager
def by(way):
    """Run compiled loops where Numba is installed, however few elements there are; or the reference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "load_for", lambda name, _: compiled.load(name) if way == "loops" else None)
        yield


def matrix(m, k, dtype, scale, seed, layout="rows"):
    return laid_out(values(m * k, dtype, scale, seed).view(m, k), layout)


@given(rows, widths, dtypes, ways, layouts, scales, st.sampled_from([1e-6, 0.5]), st.booleans(), seeds)
def test_rms_norm_and_its_gradients(m, k, dtype, way, layout, scale, eps, need_weight, seed):
    x, d_y = matrix(m, k, dtype, scale, seed, layout), matrix(m, k, dtype, 1.0, seed + 1, layout)
    weight = values(k, dtype, 1.0, seed + 2)
    with by(way):
        y, r = rms_norm.rms_norm(x, weight, eps)
        d_x, d_weight = rms_norm.rms_norm_backward(d_y, x, weight, r, need_weight)
    assert (d_weight is not None) == need_weight
    bounds.check_rms_norm(y, r, x, weight, eps)
    bounds.check_rms_norm_backward(d_x, d_weight, d_y, x, weight, r)


@given(rows, widths, dtypes, ways, layouts, scales, seeds)
def test_swiglu_and_its_gradients(m, k, dtype, way, layout, scale, seed):
    gate, up, d_y = (matrix(m, k, dtype, s, seed + i, layout) for i, s in enumerate((scale, 1.0, 1.0)))
    with by(way):
        y, (d_gate, d_up) = swiglu.swiglu(gate, up), swiglu.swiglu_backward(d_y, gate, up)
    bounds.check_swiglu(y, gate, up)
    bounds.check_swiglu_backward(d_gate, d_up, d_y, gate, up)


@given(
    st.integers(1, 3),
    st.integers(1, 5),
    rows,
    st.sampled_from([2, 6, 16, 34]),
    st.booleans(),
    st.booleans(),
    dtypes,
    ways,
    seeds,
)
def test_rotary_and_its_gradient(b, h, t, d, by_token, for_all, dtype, way, seed):
    x = values(b * t * h * d, dtype, 1.0, seed)
    x = x.view(b, t, h, d).transpose(1, 2) if by_token else x.view(b, h, t, d)
    cos, sin = values(2 * (1 if for_all else b) * t * d, dtype, 1.0, seed + 1).view(2, -1, t, d)
    with by(way):
        y, d_x = rotary.rotary(x, cos, sin), rotary.rotary_backward(x, cos, sin)
    bounds.check_rotary(y, x, cos, sin)
    bounds.check_rotary_backward(d_x, x, cos, sin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_of_every_size(dtype):
    """From where exp(-g) is past a float32 to where it is 0; one that is no number, or infinite, as in the formula."""
    gate = torch.linspace(-120, 120, 100_003).to(dtype)
    up, d_y = torch.full_like(gate, 0.7), torch.full_like(gate, -1.3)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0], dtype=dtype)
    with by("loops"):
        bounds.check_swiglu(swiglu.swiglu(gate, up), gate, up)
        bounds.check_swiglu_backward(*swiglu.swiglu_backward(d_y, gate, up), d_y, gate, up)
        made = swiglu.swiglu(odd, torch.ones_like(odd)), *swiglu.swiglu_backward(odd, odd, torch.ones_like(odd))
    with by("reference"):
        want = swiglu.swiglu(odd, torch.ones_like(odd)), *swiglu.swiglu_backward(odd, odd, torch.ones_like(odd))
    for got, truth in zip(made, want, strict=True):
        torch.testing.assert_close(got, truth, rtol=0, atol=0, equal_nan=True)


def test_a_product_that_overflows_on_the_way_is_none():
    """g u is past a float32, g sigma(g) u is not."""
    gate, up = torch.full((64,), -80.0), torch.full((64,), 3e38)
    with by("loops"):
        y = swiglu.swiglu(gate, up)
    assert y.isfinite().all()
    bounds.check_swiglu(y, gate, up)


@pytest.mark.parametrize("way", ["loops", "reference"])
def test_norm_of_tiny_rows_without_eps(way):
    """r is 1e15: its cube would be past a float32."""
    x = values(3 * 40, torch.float32, 1e-15, 1).view(3, 40)
    weight, d_y = values(40, torch.float32, 1.0, 2), values(120, torch.float32, 1e-20, 3).view(3, 40)
    with by(way):
        y, r = rms_norm.rms_norm(x, weight, 0.0)
        d_x, _ = rms_norm.rms_norm_backward(d_y, x, weight, r, False)
    bounds.check_rms_norm(y, r, x, weight, 0.0)
    bounds.check_rms_norm_backward(d_x, None, d_y, x, weight, r)


@pytest.mark.parametrize("way", ["loops", "reference"])
def test_nothing_and_views_of_the_negative(way):
    """No rows give no rows; a tensor whose sign is a bit, as the imaginary part of a conjugate has, is read right."""
    negative = torch.view_as_complex(torch.randn(5, 8, 2)).conj().imag
    assert negative.is_neg()
    weight = torch.ones(8)
    with by(way):
        assert rms_norm.rms_norm(negative[:0], weight, 1e-6)[0].shape == (0, 8)
        assert swiglu.swiglu(negative[:0], negative[:0]).shape == (0, 8)
        bounds.check_rms_norm(*rms_norm.rms_norm(negative, weight, 1e-6), negative.resolve_neg(), weight, 1e-6)
        bounds.check_swiglu(swiglu.swiglu(negative, negative), *(negative.resolve_neg(),) * 2)


def test_logistic_function_errs_by_a_rounding_or_two():
    """From where exp(-g) decides to where it is small: the series that it is made of is not what it errs by."""
    gate = torch.linspace(-80, 4, 100_003)
    with by("loops"):
        y = swiglu.swiglu(gate, torch.ones_like(gate)).double()
    truth = gate.double() * torch.sigmoid(gate.double())
    off = ((y - truth) / truth).abs() / bounds.E
    assert off.max() <= 4 and off.square().mean().sqrt() <= 0.9


def test_bfloat16_is_rounded_to_even_and_has_one_nan():
    """1 + 2^-8 and 1 + 3 2^-8 lie halfway; a NaN's other bits, and its sign, go."""
    pytest.importorskip("numba")
    x = torch.ones(1, 1, 4, 2, dtype=torch.bfloat16)
    cos = torch.tensor([[1.0, 1.0], [1 + 2**-7, 1.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.bfloat16)[None]
    sin = torch.tensor([[-(2.0**-8), 0.0]] * 2 + [[0.0, 0.0]] * 2, dtype=torch.bfloat16)[None]
    x[0, 0, 2:] = torch.tensor([[0x7FFF, 0x7F81], [-1, 0x7FC0]], dtype=torch.int16).view(torch.bfloat16)
    with by("loops"):
        y = rotary.rotary(x, cos, sin)[0, 0]
    assert y[:2, 0].tolist() == [1.0, 1 + 2**-6]
    assert (y[2:].view(torch.int16) == 0x7FC0).all()


def test_gradient_of_a_norms_weight_is_made_in_parts_that_no_two_threads_share():
    pytest.importorskip("numba")
    x, d_y, r = torch.randn(10, 3), torch.randn(10, 3), torch.rand(10)
    parts, d_x = torch.zeros(3, 3), torch.empty(10, 3)
    loops = compiled.load("rms_norm")
    given = (t.numpy() for t in (d_y, x, torch.ones(3), r, d_x, parts))
    chunks.share(loops.backward, 10, 4, 4, *given, 4)
    want = [(d_y * x * r[:, None])[first : first + 4].sum(0) for first in (0, 4, 8)]
    torch.testing.assert_close(parts, torch.stack(want))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_longer_than_a_range_and_a_sign_that_is_a_bit(dtype):
    x, weight = matrix(3, 200, dtype, 1.0, 0), values(200, dtype, 1.0, 1)
    heads, cos, sin = (
        values(2 * 3 * 5 * 20, dtype, 1.0, 2).view(2, 5, 3, 20),
        *values(240, dtype, 1, 3).view(2, 2, 3, 20),
    )
    with by("loops"):
        y, r = rms_norm.rms_norm(torch._neg_view(x), weight, 1e-6)
        d_x, d_weight = rms_norm.rms_norm_backward(x, torch._neg_view(x), weight, r, True)
        turned = rotary.rotary(torch._neg_view(heads), cos, sin)
    bounds.check_rms_norm(y, r, -x, weight, 1e-6)
    bounds.check_rms_norm_backward(d_x, d_weight, x, -x, weight, r)
    bounds.check_rotary(turned, -heads, cos, sin)


def test_threads_give_the_same_bits_every_time():
    x, d_y = torch.randn(301, 512), torch.randn(301, 512)
    weight, threads = torch.randn(512), torch.get_num_threads()
    made = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            with by("loops"):
                y, r = rms_norm.rms_norm(x, weight, 1e-6)
                made.append((y, *rms_norm.rms_norm_backward(d_y, x, weight, r, True), swiglu.swiglu(x, d_y)))
    finally:
        torch.set_num_threads(threads)
    for other in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(made[0], other, strict=True))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("way", ["loops", "reference"])
def test_the_dtype_that_new_tensors_have_by_default_is_nobodys(default, way):
    x, d_y, weight = (values(n, torch.float32, 1.0, n).view(-1, 8) for n in (40, 48, 8))
    torch.set_default_dtype(default)
    try:
        with by(way):
            y, r = rms_norm.rms_norm(x, weight[0], 1e-6)
            d_x, d_weight = rms_norm.rms_norm_backward(d_y[:5], x, weight[0], r, True)
    finally:
        torch.set_default_dtype(torch.float32)
    bounds.check_rms_norm(y, r, x, weight[0], 1e-6)
    bounds.check_rms_norm_backward(d_x, d_weight, d_y[:5], x, weight[0], r)
