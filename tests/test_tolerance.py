"""What the tests' bounds let pass: sound results, and overflow where the truth has it; not 1 percent, no infinity."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_bounds import GRADIENTS, check_backward, check_backward_of_several, check_forward
from strategies import DTYPES, laid_out, layouts, linear_operands, seeds, sizes, values
from tolerance import DEVIATIONS, RMS_ELEMENTS, Roundings, assert_within_bound, assert_within_rounding, different

from lora_core.cpu.lora_linear import lora_linear, lora_linear_backward
from lora_core.reference import lora_linears as several

SEED = torch.tensor([77])
SCALING = 0.7
HALVES = [torch.float16, torch.bfloat16]
# M, N, K, R
SHAPES = [(131, 65, 131, 17), (64, 96, 512, 16)]
INF = float("inf")
refused = pytest.raises(AssertionError, match="times the rounding bound|rms error")


def off(results, name, names):
    """Return the results with the named one 1 percent too large."""
    return [(1.01 * t.double()).to(t.dtype) if name == own else t for own, t in zip(names, results, strict=True)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtypes", [(d, d) for d in DTYPES] + [(torch.bfloat16, torch.float32)], ids=str)
def test_each_result_1_percent_off_is_refused(dtypes, dropout, shape):
    m, n, _, r = shape
    operands = linear_operands(*shape, *dtypes, 0)
    rest = (SCALING, dropout, SEED)
    found = lora_linear(*operands, *rest)
    check_forward(found[0], *operands, *rest, found[1])
    for name in ("y", "hidden"):
        y, hidden = off(found, name, ("y", "hidden"))
        with refused:
            check_forward(y, *operands, *rest, hidden)

    x, weight, _, lora_a, lora_b = operands
    d_y = values(m * n, dtypes[0], 1.0, n).view(m, n)
    operands = (d_y, x, weight, lora_a, lora_b, found[1], *rest)
    grads = lora_linear_backward(*operands, (True,) * 5)
    check_backward(grads, *operands)
    for name in GRADIENTS:
        with refused:
            check_backward(off(grads, name, GRADIENTS), *operands)


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtypes", [(d, d) for d in DTYPES] + [(torch.bfloat16, torch.float32)], ids=str)
def test_a_gradient_of_several_layers_1_percent_off_is_refused(dtypes, dropout, count):
    m, n, k, r = SHAPES[1]
    made = [linear_operands(m, n, k, r, *dtypes, seed) for seed in range(count)]
    x, (_, weights, _, lora_as, lora_bs) = made[0][0], zip(*made, strict=True)
    rest = ([SCALING] * count, [dropout] * count, [SEED + i for i in range(count)])
    _, hidden = several.forward(x, weights, [None] * count, lora_as, lora_bs, *rest)
    d_ys = [values(m * n, dtypes[0], 1.0, i).view(m, n) for i in range(count)]
    d_x, d_lora_a, d_lora_bs = several.backward(d_ys, x, weights, lora_as, lora_bs, hidden, *rest, True, True)
    layers = list(zip(weights, lora_as, lora_bs, hidden.split([r] * count, 1), *rest, strict=True))
    pairs = list(zip(d_lora_a.split([r] * count), d_lora_bs, strict=True))
    check_backward_of_several(d_x, pairs, d_ys, layers, x)
    with refused:
        check_backward_of_several((1.01 * d_x.double()).to(d_x.dtype), pairs, d_ys, layers, x)


@given(sizes, sizes, sizes, layouts, st.booleans(), st.sampled_from(HALVES), seeds)
def test_roundings_through_a_product_hold_what_rounding_leaves_there(m, n, k, lie, first, dtype, seed):
    """Of random operands, and where either repeats itself."""
    v, terms = values(m * n, torch.float32, 1.0, seed).view(m, n), values(n * k, torch.float32, 1.0, seed + 1)
    v, terms = laid_out(v, lie if first else "rows").double(), terms.view(n, k)
    terms = laid_out(terms, "rows" if first else lie).double()
    info = torch.finfo(dtype)
    bound = Roundings.of(info.eps / 2 * v.abs() + info.smallest_normal * info.eps).through(terms)
    assert_within_bound(v.to(dtype).double() @ terms, v @ terms, bound + Roundings.of(1e-12 * v.abs() @ terms.abs()))


def test_roundings_of_few_values_add_up_and_those_of_many_by_their_squares():
    one, many = (Roundings.of(torch.full((1, n), 0.5).double()) for n in (1, 10_000))
    assert one.through(torch.full((1, 1), -3.0).double()).most.item() == 1.5
    assert many.through(torch.ones(10_000, 1).double()).most.item() == DEVIATIONS * 0.5 * 100


def test_repeated_and_outweighed_elements_are_not_counted():
    distinct = torch.arange(2 * RMS_ELEMENTS).double()
    even = torch.ones_like(distinct)
    assert different(distinct, even) == pytest.approx(2 * RMS_ELEMENTS)
    assert different(distinct // 4, even) == pytest.approx(RMS_ELEMENTS / 2)
    assert different(distinct, torch.where(distinct < 3, 1.0, 1e-9)) == pytest.approx(3, rel=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_that_the_truth_does_not_have_are_refused(dtype):
    operands = linear_operands(6, 30, 20, 3, dtype, dtype, 0)
    y, _ = lora_linear(*operands, SCALING, 0.0, None)
    check_forward(y, *operands, SCALING)
    with refused:
        check_forward(torch.full_like(y, INF), *operands, SCALING)
    for planted in (INF, -INF):
        wrong = y.clone()
        wrong[2, 3] = planted
        with refused:
            check_forward(wrong, *operands, SCALING)
    with pytest.raises(AssertionError, match="NaN"):
        check_forward(torch.full_like(y, float("nan")), *operands, SCALING)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_overflow_is_that_of_the_truth_or_within_the_bound_of_it(dtype, sign):
    info = torch.finfo(dtype)

    def check(got, truth):
        truth = torch.tensor([sign * truth], dtype=torch.float64)
        assert_within_bound(torch.tensor([sign * got]).to(dtype), truth, 2 * info.eps * truth.abs())

    check(INF, 3 * info.max)
    check(INF, INF)
    # the sum may be rounded up to where it overflows, or down
    check(INF, (1 - info.eps) * info.max)
    check(info.max, (1 + info.eps) * info.max)
    near = (1 - 4 * info.eps) * info.max
    for got, truth in ((-INF, 3 * info.max), (-INF, INF), (INF, near), (info.max, 3 * info.max), (info.max, INF)):
        with refused:
            check(got, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_that_overflows_is_sound(dtype):
    """Sums of 4 products, half of them past the largest number, of either sign."""
    largest = torch.finfo(dtype).max
    x = torch.tensor([[1.0], [-1.0], [0.5], [-0.5]]).expand(4, 4).to(dtype)
    weight = torch.full((3, 4), 0.4 * largest, dtype=dtype)
    a, b = torch.ones(2, 4, dtype=dtype), torch.ones(3, 2, dtype=dtype)
    y = (x.double() @ weight.double().T + SCALING * x.double() @ a.double().T @ b.double().T).to(dtype)
    assert y.isinf().sum() == 6
    check_forward(y, x, weight, None, a, b, SCALING)
    with refused:
        check_forward(-y, x, weight, None, a, b, SCALING)


def test_a_bias_of_half_the_bound_is_refused_by_its_rms():
    """As every element of it is within the bound."""
    truth = torch.randn(1000, generator=torch.Generator().manual_seed(0)).double()
    bound = torch.finfo(torch.bfloat16).eps * truth.abs()
    assert_within_bound((truth + 0.6 * bound).float(), truth, bound)
    with pytest.raises(AssertionError, match="rms"):
        assert_within_bound((truth + 0.8 * bound).float(), truth, bound)
    with pytest.raises(AssertionError, match="times"):
        assert_within_rounding(torch.tensor([1.01]), lambda t: t, torch.tensor([1.0]), depth=1)
