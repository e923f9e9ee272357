"""dora_norm: the algebra against the dense formula, the op's edges, and the kernels on a GPU or in the interpreter."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import block_sizes, dtype_pairs, linear_operands, ranks, seeds, sizes
from tolerance import UNIT_FP32, assert_within_bound

import lora_core as lc
from lora_core.kernels.dora_norm import launch_dora_norm, launch_nf4_dora_norm
from lora_core.ops.dora_norm import dora_norm, nf4_op, op
from lora_core.ops.packed import Packed
from lora_core.reference import dora as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# an NF4 weight is read by the word where they are a multiple of 16
columns = st.sampled_from([1, 7, 16, 40, 64, 67, 144, 300, 320])
scalings = st.sampled_from([0.5, 2.0, -1.7, 0.0])


def check(norm, weight, lora_a, lora_b, scaling):
    """Compare the squares: each is a sum of 3 terms, of K, K + R and R + R + K products, rounded once by the root.

    |norm^2 - V^2| <= sums, and the root's own rounding adds twice its unit to the square.
    """
    w, a, b = (t.double().cpu() for t in (weight, lora_a, lora_b))
    truth = (w + scaling * b @ a).square().sum(1)
    cross = 2 * abs(scaling) * (b.abs() * (w.abs() @ a.T.abs())).sum(1)
    own = scaling**2 * (b.abs() * (b.abs() @ (a.abs() @ a.T.abs()))).sum(1)
    length = a.shape[1] + 2 * a.shape[0] + 4
    slack = 2 * UNIT_FP32 * length**0.5 * (w.square().sum(1) + cross + own) + 4 * UNIT_FP32 * truth
    assert norm.dtype == torch.float32 and norm.shape == truth.shape
    squares = norm.double().cpu().square()
    # a double carries the bound: nothing of float32 is left to round
    assert_within_bound(squares, truth, slack + torch.finfo(torch.float32).smallest_normal)


@given(sizes, columns, ranks, dtype_pairs, scalings, st.integers(1, 4), seeds)
def test_dora_norm_kernel_matches_the_dense_formula(n, k, r, dtypes, scaling, splits, seed):
    _, weight, _, lora_a, lora_b = linear_operands(1, n, k, r, *dtypes, seed, DEVICE)
    check(launch_dora_norm(weight, lora_a, lora_b, scaling, splits), weight, lora_a, lora_b, scaling)


@given(sizes, columns, ranks, dtype_pairs, block_sizes, st.booleans(), scalings, st.integers(1, 4), seeds)
def test_nf4_dora_norm_kernel_matches_the_dense_formula(n, k, r, dtypes, block, nested, scaling, splits, seed):
    _, weight, _, lora_a, lora_b = linear_operands(1, n, k, r, *dtypes, seed, DEVICE)
    q = lc.quantize_nf4(weight, block, nested)
    norm = launch_nf4_dora_norm(*Packed.of(q), dtypes[0], lora_a, lora_b, scaling, splits)
    check(norm, q.dequantize(dtypes[0]), lora_a, lora_b, scaling)


@given(sizes, columns, ranks, dtype_pairs, scalings, seeds)
def test_dora_norm_by_algebra_is_the_dense_formula(n, k, r, dtypes, scaling, seed):
    """The operation, which runs the reference on a CPU, without forming B A."""
    _, weight, _, lora_a, lora_b = linear_operands(1, n, k, r, *dtypes, seed)
    check(dora_norm(weight, lora_a, lora_b, scaling), weight, lora_a, lora_b, scaling)
    wide = [t.double() for t in (weight, lora_a, lora_b)]
    assert reference.dora_norm(*wide, scaling).dtype == torch.float64
    check(reference.dora_norm_dense(*wide, scaling).float(), *wide, scaling)


@pytest.mark.parametrize("quantised", [False, True])
def test_dora_norm_kernel_bound_rejects_a_result_1_percent_off(quantised):
    _, weight, _, lora_a, lora_b = linear_operands(1, 300, 64, 8, torch.bfloat16, torch.bfloat16, 0, DEVICE)
    q = lc.quantize_nf4(weight)
    with pytest.raises(AssertionError, match="rounding bound|rms"):
        if quantised:
            norm = launch_nf4_dora_norm(*Packed.of(q), torch.bfloat16, lora_a, lora_b, 0.505)
        else:
            norm = launch_dora_norm(weight, lora_a, lora_b, 0.505)
        check(norm, q.dequantize() if quantised else weight, lora_a, lora_b, 0.5)


def test_dora_norm_kernels_take_any_strides_give_the_same_bits_twice_and_change_nothing():
    _, weight, _, lora_a, lora_b = linear_operands(1, 70, 600, 9, torch.bfloat16, torch.bfloat16, 0, DEVICE)
    loose = [t.T.contiguous().T for t in (weight, lora_a, lora_b)]
    before = [t.clone() for t in loose]
    first, second = (launch_dora_norm(*loose, 0.5) for _ in range(2))
    check(first, weight, lora_a, lora_b, 0.5)
    assert torch.equal(first, second) and all(torch.equal(a, b) for a, b in zip(loose, before, strict=True))


def test_dora_norm_kernel_reads_nothing_behind_a():
    """K is no multiple of a step, and what follows A's last row is no number."""
    behind = torch.full((3 * 33 + 64,), float("nan"), device=DEVICE)
    lora_a = behind[: 3 * 33].view(3, 33).normal_()
    weight, lora_b = torch.randn(5, 33, device=DEVICE), torch.randn(5, 3, device=DEVICE)
    assert launch_dora_norm(weight, lora_a, lora_b, 1.0).isfinite().all()


@pytest.mark.parametrize("shape", [(0, 8, 2), (3, 8, 0), (3, 0, 2)], ids=str)
def test_dora_norm_takes_empty_operands(shape):
    n, k, r = shape
    weight, lora_a, lora_b = (
        torch.randn(n, k, device=DEVICE),
        torch.randn(r, k, device=DEVICE),
        torch.randn(n, r, device=DEVICE),
    )
    for run in (launch_dora_norm, dora_norm):
        check(run(weight, lora_a, lora_b, 1.0), weight, lora_a, lora_b, 1.0)


def test_dora_norm_of_a_cancelled_weight_is_zero_not_nan():
    """W = -s B A: rounding may leave the square below zero."""
    lora_a, lora_b = torch.randn(4, 50, device=DEVICE), torch.randn(30, 4, device=DEVICE)
    weight = -0.5 * lora_b @ lora_a
    for norm in (launch_dora_norm(weight, lora_a, lora_b, 0.5), dora_norm(weight, lora_a, lora_b, 0.5)):
        assert not norm.isnan().any()
        check(norm, weight, lora_a, lora_b, 0.5)


@pytest.mark.parametrize("quantised", [False, True])
def test_dora_norm_under_autocast_is_that_outside(quantised):
    weight, lora_a, lora_b = (torch.randn(*s, device=DEVICE) for s in ((30, 128), (4, 128), (30, 4)))
    w = lc.quantize_nf4(weight) if quantised else weight
    with torch.autocast(DEVICE, torch.bfloat16):
        norm = dora_norm(w, lora_a, lora_b, 0.5)
    assert torch.equal(norm, dora_norm(w, lora_a, lora_b, 0.5))


def test_dora_norm_runs_float64_on_the_reference():
    weight, lora_a, lora_b = (
        t.double().to(DEVICE) for t in (torch.randn(5, 40), torch.randn(2, 40), torch.randn(5, 2))
    )
    norm = launch_dora_norm(weight, lora_a, lora_b, 0.5)
    assert norm.dtype == torch.float64
    check(norm.float(), weight, lora_a, lora_b, 0.5)
    q = lc.quantize_nf4(weight.float())
    dense = q.dequantize(torch.float64)
    norm = launch_nf4_dora_norm(*Packed.of(q), torch.float64, lora_a, lora_b, 0.5)
    assert norm.dtype == torch.float64
    check(norm.float(), dense, lora_a, lora_b, 0.5)


@pytest.mark.parametrize("quantised", [False, True])
def test_dora_norm_ops_pass_opcheck_and_have_no_gradient(quantised):
    weight, lora_a, lora_b = torch.randn(5, 40), torch.randn(2, 40), torch.randn(5, 2)
    q = lc.quantize_nf4(weight)
    if quantised:
        torch.library.opcheck(nf4_op, (*Packed.of(q)[:4], list(q.shape), 64, 256, torch.float32, lora_a, lora_b, 0.5))
    else:
        torch.library.opcheck(op, (weight, lora_a, lora_b, 0.5))
    norm = dora_norm(q if quantised else weight, lora_a.requires_grad_(), lora_b.requires_grad_(), 0.5)
    assert not norm.requires_grad
    check(norm, q.dequantize() if quantised else weight, lora_a.detach(), lora_b.detach(), 0.5)


def test_dora_norm_refuses_what_does_not_fit():
    weight, lora_a, lora_b = torch.randn(5, 40), torch.randn(2, 40), torch.randn(5, 2)
    with pytest.raises(lc.ShapeError, match=r"lora_a \(2, 39\)"):
        dora_norm(weight, lora_a[:, :39], lora_b, 0.5)
    with pytest.raises(lc.DtypeError, match="lora_a torch.bfloat16"):
        dora_norm(weight, lora_a.bfloat16(), lora_b.bfloat16(), 0.5)
    with pytest.raises(lc.DeviceError, match="lora_b on meta"):
        dora_norm(weight, lora_a, lora_b.to("meta"), 0.5)
    with pytest.raises(lc.DtypeError, match="lora_a is a NoneType"):
        dora_norm(weight, None, lora_b, 0.5)
    for scaling in ("2", float("nan")):
        with pytest.raises(lc.ConfigError, match="scaling is .* want a finite number"):
            dora_norm(weight, lora_a, lora_b, scaling)
    from lora_core.quant import quantize

    with pytest.raises(lc.ConfigError, match="quant_type is 'fp4'"):
        dora_norm(quantize(weight, "fp4"), lora_a, lora_b, 0.5)
