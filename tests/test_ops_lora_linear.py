"""lora_core::lora_linear and lora_core::nf4_lora_linear: values, gradients, compilation, refusals."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_bounds import check_forward
from tolerance import assert_within_rounding
from torch.utils.checkpoint import checkpoint

import lora_core as lc
from lora_core.ops.lora_linear import backward_op, lora_linear, op
from lora_core.ops.nf4_lora_linear import nf4_lora_linear
from lora_core.ops.nf4_lora_linear import op as nf4_op
from lora_core.ops.packed import Packed
from lora_core.reference import lora as reference
from lora_core.reference import nf4 as nf4_reference

SIZES = st.sampled_from([1, 2, 3, 7, 16, 17, 31, 65])
RANKS = st.sampled_from([1, 2, 3, 5, 8, 16, 33])
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SEED = torch.tensor([77])


def operands(m, n, k, r, dtype=torch.float32, low=None, seed=0, lead=None):
    g = torch.Generator().manual_seed(seed)
    low = low or dtype
    x = torch.randn(*(lead or (m,)), k, generator=g).to(dtype)
    weight, bias = torch.randn(n, k, generator=g).to(dtype), torch.randn(n, generator=g).to(dtype)
    return x, weight, bias, torch.randn(r, k, generator=g).to(low), torch.randn(n, r, generator=g).to(low)


@given(SIZES, SIZES, SIZES, RANKS, st.sampled_from(DTYPES), st.booleans(), st.sampled_from([0.0, 0.1, 0.9]))
def test_lora_linear_matches_the_formula(m, n, k, r, dtype, low_fp32, dropout):
    args = operands(m, n, k, r, dtype, torch.float32 if low_fp32 else None)
    y = lora_linear(*args, 0.5, dropout, SEED)
    assert y.dtype == dtype and y.shape == (m, n)
    check_forward(y, *args, 0.5, dropout, SEED)


@given(SIZES, SIZES, SIZES, RANKS, st.sampled_from(DTYPES), st.booleans(), st.sampled_from([32, 64, 256]))
def test_nf4_lora_linear_matches_the_formula(m, n, k, r, dtype, double_quant, block_size):
    x, weight, bias, a, b = operands(m, n, k, r, dtype, torch.float32)
    q = lc.quantize_nf4(weight, block_size, double_quant)
    parts = (q.codes, q.absmax, q.nested_absmax, q.nested_offset, q.shape, block_size)
    as_written = nf4_reference.nf4_lora_linear(x, *parts, bias, a, b, 0.5)
    for y in (nf4_lora_linear(x, q, bias, a, b, 0.5), as_written):
        assert y.dtype == dtype and y.shape == (m, n)
        check_forward(y, x, q.dequantize(dtype), bias, a, b, 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part", ["update", "base"])
def test_lora_linear_tolerance_rejects_a_result_1_percent_off(dtype, part):
    x, weight, bias, a, b = operands(64, 64, 48, 8, dtype)
    zero = torch.zeros_like
    if part == "update":
        wrong, right = (x, zero(weight), zero(bias), a, b, 0.505), (x, zero(weight), zero(bias), a, b, 0.5)
    else:
        wrong, right = (x, 1.01 * weight, bias, a, zero(b), 0.5), (x, weight, bias, a, zero(b), 0.5)
    with pytest.raises(AssertionError, match="rounding bound|rms"):
        check_forward(lora_linear(*wrong), *right)


@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 0), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("quantized", [False, True])
def test_ops_take_any_leading_dimensions(lead, quantized):
    x, weight, bias, a, b = operands(1, 6, 32, 3, lead=lead or None)
    x = x.reshape(-1)[:32] if lead == () else x
    x.requires_grad_()
    y = (
        nf4_lora_linear(x, lc.quantize_nf4(weight), bias, a, b, 1.0)
        if quantized
        else lora_linear(x, weight, bias, a, b, 1.0)
    )
    assert y.shape == (*lead, 6)
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_lora_linear_takes_any_strides():
    x, weight, bias, a, b = operands(6, 5, 8, 3)
    want = lora_linear(x, weight, bias, a, b, 0.5)
    strided = [
        torch.stack([x, x], -1)[..., 0],
        weight.T.contiguous().T,
        torch.stack([bias, bias], -1)[:, 0],
        a.T.contiguous().T,
        torch.cat([b, b], 1)[:, :3],
    ]
    assert all(not s.is_contiguous() for s in strided)
    check_forward(lora_linear(*strided, 0.5), x, weight, bias, a, b, 0.5)
    assert want.is_contiguous()


def test_ops_change_no_input():
    args = operands(6, 5, 32, 3)
    q = lc.quantize_nf4(args[1])
    before = [a.clone() for a in (*args, *q.buffers())]
    lora_linear(*args, 0.5, 0.5, SEED)
    nf4_lora_linear(args[0], q, *args[2:], 0.5, 0.5, SEED)
    assert all(torch.equal(a, b) for a, b in zip((*args, *q.buffers()), before, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
def test_lora_linear_gradient_matches_finite_differences(bias, dropout):
    x, weight, b, lora_a, lora_b = (t.requires_grad_() for t in operands(1, 5, 7, 3, torch.float64, lead=(2, 3)))
    inputs = (x, weight, b, lora_a, lora_b) if bias else (x, weight, lora_a, lora_b)

    def run(x, weight, *rest):
        return lora_linear(x, weight, rest[0] if bias else None, *rest[-2:], 0.7, dropout, SEED)

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_nf4_lora_linear_gradient_matches_finite_differences(dropout):
    x, weight, bias, a, b = operands(4, 5, 32, 3, torch.float64)
    q = lc.quantize_nf4(weight.float())
    inputs = [t.requires_grad_() for t in (x, bias, a, b)]
    run = lambda x, bias, a, b: nf4_lora_linear(x, q, bias, a, b, 0.7, dropout, SEED)  # noqa: E731
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradcheck(lambda x: nf4_lora_linear(x, q, None, None, None, 0.0), [x])


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)), ids=str)
def test_gradients_are_computed_for_just_the_inputs_that_need_them(needs):
    """Every subset: each gradient equals autograd's through the plain formula, and no other is made."""
    x, weight, bias, a, b = operands(6, 5, 32, 3, torch.float64)
    q = lc.quantize_nf4(weight.float())
    dense = q.dequantize(torch.float64)
    if not any(needs):
        assert not nf4_lora_linear(x, q, bias, a, b, 0.5).requires_grad
        return
    grads = []
    for run in (
        lambda x, bias, a, b: reference.lora_linear(x, dense, bias, a, b, 0.5, 0.3, SEED),
        lambda x, bias, a, b: lora_linear(x, dense, bias, a, b, 0.5, 0.3, SEED),
        lambda x, bias, a, b: nf4_lora_linear(x, q, bias, a, b, 0.5, 0.3, SEED),
    ):
        leaves = [t.clone().requires_grad_(need) for t, need in zip((x, bias, a, b), needs, strict=True)]
        run(*leaves).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for plain, dense_op, nf4 in zip(*grads, strict=True):
        assert (plain is None) == (dense_op is None) == (nf4 is None)
        if plain is not None:
            # float64 on both sides: a float32 rounding stands far above their difference
            assert_within_rounding(dense_op.float(), lambda g: g, plain, depth=1)
            assert_within_rounding(nf4.float(), lambda g: g, plain, depth=1)


def test_saved_tensors_hold_no_dense_weight_and_no_copy_of_x_unless_needed():
    x, weight, bias, a, b = operands(4, 48, 64, 2)
    q = lc.quantize_nf4(weight)

    def saved(run):
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
            run()
        return shapes

    x.requires_grad_()
    frozen = saved(lambda: nf4_lora_linear(x, q, bias, None, None, 0.0))
    assert (48, 64) not in frozen and (4, 64) not in frozen
    a.requires_grad_(), b.requires_grad_()
    trained = saved(lambda: nf4_lora_linear(x, q, bias, a, b, 1.0))
    assert (48, 64) not in trained and trained.count((4, 64)) == 1
    # the dense op keeps the weight itself, not a copy
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        lora_linear(x, weight, bias, a, b, 1.0)
    assert weight.data_ptr() in kept and x.data_ptr() in kept


def test_second_backward_through_the_same_graph_gives_the_same_gradient():
    x, weight, bias, a, b = operands(4, 5, 8, 2)
    a.requires_grad_(), b.requires_grad_()
    loss = lora_linear(x, weight, bias, a, b, 1.0).square().sum()
    first = torch.autograd.grad(loss, (a, b), retain_graph=True)
    second = torch.autograd.grad(loss, (a, b))
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_lora_linear_passes_opcheck(dtype, dropout):
    x, weight, bias, a, b = operands(4, 5, 8, 3, dtype)
    for t in (x, a, b):
        t.requires_grad_()
    for with_bias in (bias, None):
        torch.library.opcheck(op, (x, weight, with_bias, a, b, 0.5, dropout, SEED if dropout else None))
    y, hidden = op(x, weight, bias, a, b, 0.5, 0.0, None)
    given = (torch.ones_like(y), x.detach(), weight, a.detach(), b.detach(), hidden)
    for needs in ([True] * 5, [False, False, False, True, True]):
        torch.library.opcheck(backward_op, (*given, 0.5, 0.0, None, needs))


@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4_lora_linear_passes_opcheck(double_quant):
    x, weight, bias, a, b = operands(4, 5, 64, 3)
    q = lc.quantize_nf4(weight, double_quant=double_quant)
    for t in (x, a, b):
        t.requires_grad_()
    packed = (q.codes, q.absmax, q.nested_absmax, q.nested_offset, list(q.shape), q.block_size, q.nested_block_size)
    torch.library.opcheck(nf4_op, (x, *packed, bias, a, b, 0.5, 0.0, None))


@pytest.mark.parametrize("quantized", [False, True])
def test_ops_compile_into_one_graph_for_all_batch_sizes(quantized):
    _, weight, bias, a, b = operands(1, 5, 64, 3)
    q = lc.quantize_nf4(weight)
    a.requires_grad_(), b.requires_grad_()

    def run(x):
        return nf4_lora_linear(x, q, bias, a, b, 0.5) if quantized else lora_linear(x, weight, bias, a, b, 0.5)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for m in (2, 3, 17, 64):
        x = torch.randn(m, 64)
        torch._dynamo.mark_dynamic(x, 0)
        y = compiled(x)
        assert torch.equal(y, run(x))
        y.sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_under_checkpointing_are_those_without(reentrant):
    x, weight, bias, a, b = operands(4, 5, 8, 3)
    leaves = [t.requires_grad_() for t in (x, a, b)]

    def run(x, a, b):
        return lora_linear(x, weight, bias, a, b, 0.5, 0.3, SEED)

    plain = torch.autograd.grad(run(*leaves).square().sum(), leaves)
    checkpoint(run, *leaves, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(p, leaf.grad) for p, leaf in zip(plain, leaves, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_what_the_cast_operands_give(dtype):
    x, weight, bias, a, b = operands(4, 5, 64, 3)
    q = lc.quantize_nf4(weight)
    cast = [t.to(dtype) for t in (x, weight, bias, a, b)]
    with torch.autocast("cpu", dtype=dtype):
        dense, nf4 = lora_linear(x, weight, bias, a, b, 0.5), nf4_lora_linear(x, q, bias, a, b, 0.5)
    assert torch.equal(dense, lora_linear(*cast, 0.5))
    assert torch.equal(nf4, nf4_lora_linear(cast[0], q, *cast[2:], 0.5))


GOOD = operands(4, 5, 64, 3)


@pytest.mark.parametrize("scaling", [1, 1.0])
def test_parts_of_a_4bit_weight_are_refused_where_a_dense_one_is_wanted(scaling):
    x, weight, bias, a, b = GOOD
    with pytest.raises(lc.DtypeError, match="weight is a Packed; want a torch.Tensor: call nf4_lora_linear"):
        lora_linear(x, Packed.of(lc.quantize_nf4(weight)), bias, a, b, scaling)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: torch.randn(4, 63)}, lc.ShapeError, r"x \(4, 63\)"),
        ({2: torch.randn(4)}, lc.ShapeError, r"bias \(4,\)"),
        ({3: torch.randn(3, 63)}, lc.ShapeError, r"lora_a \(3, 63\)"),
        ({4: torch.randn(5, 2)}, lc.ShapeError, r"lora_b \(5, 2\)"),
        ({0: torch.tensor(1.0)}, lc.ShapeError, r"x \(\)"),
        ({0: torch.ones(4, 64, dtype=torch.int64)}, lc.DtypeError, "x torch.int64"),
        ({3: GOOD[3].bfloat16()}, lc.DtypeError, "lora_a torch.bfloat16"),
        ({3: GOOD[3].double(), 4: GOOD[4].double()}, lc.DtypeError, "lora_a torch.float64, lora_b torch.float64"),
        ({3: GOOD[3].to("meta")}, lc.DeviceError, "lora_a on meta"),
    ],
    ids=[
        "x_columns",
        "bias",
        "lora_a",
        "lora_b",
        "x_scalar",
        "x_integer",
        "lora_a_half",
        "pair_wide",
        "lora_a_elsewhere",
    ],
)
@pytest.mark.parametrize("quantized", [False, True])
def test_ops_refuse_operands_that_do_not_fit(change, error, message, quantized):
    x, weight, bias, a, b = (change.get(i, t) for i, t in enumerate(GOOD))
    with pytest.raises(error, match=message):
        if quantized:
            nf4_lora_linear(x, lc.quantize_nf4(weight), bias, a, b, 0.5)
        else:
            lora_linear(x, weight, bias, a, b, 0.5)


def test_lora_linear_refuses_mixed_compute_dtypes_saying_what_to_do():
    x, weight, bias, a, b = GOOD
    with pytest.raises(lc.DtypeError, match=r"x torch.float16, weight torch.float32.*x.to\(weight.dtype\)"):
        lora_linear(x.half(), weight, bias, a, b, 0.5)


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_ops_refuse_a_dropout_that_is_no_probability(dropout):
    with pytest.raises(lc.ConfigError, match=r"want a probability"):
        lora_linear(*GOOD, 0.5, dropout, SEED)


@pytest.mark.parametrize("seed", [None, torch.tensor([1, 2]), torch.tensor([1.0])], ids=["none", "two", "float"])
def test_ops_refuse_dropout_without_a_seed(seed):
    with pytest.raises(lc.ConfigError, match="needs a seed"):
        lora_linear(*GOOD, 0.5, 0.1, seed)


def test_nf4_lora_linear_refuses_other_weights():
    x, weight, bias, a, b = GOOD
    from lora_core.quant import quantize

    with pytest.raises(lc.ConfigError, match="a Tensor"):
        nf4_lora_linear(x, weight, bias, a, b, 0.5)
    with pytest.raises(lc.ConfigError, match="quant_type 'fp4'"):
        nf4_lora_linear(x, quantize(weight, "fp4"), bias, a, b, 0.5)
    with pytest.raises(lc.ConfigError, match="go together"):
        nf4_lora_linear(x, lc.quantize_nf4(weight), bias, a, None, 0.5)


def test_what_is_no_tensor_and_no_number_is_refused():
    x, weight, a, b = torch.randn(2, 4), torch.randn(3, 4), torch.randn(2, 4), torch.randn(3, 2)
    with pytest.raises(lc.DtypeError, match="lora_linear: x is a list; want a torch.Tensor"):
        lora_linear([1.0], weight, None, a, b, 1.0)
    with pytest.raises(lc.ConfigError, match="scaling is '2'; want a finite number"):
        lora_linear(x, weight, None, a, b, "2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 5)}, "the last dimension of x has to be that of weight, 4"),
        ({"bias": (4,)}, r"bias has to be \[3\]"),
        ({"lora_a": (4, 2)}, r"lora_a has to be \[R, 4\]; pass lora_a.T"),
        ({"lora_b": (2, 3)}, r"lora_b has to be \[3, 2\]; pass lora_b.T"),
        ({"weight": (3,)}, "weight has 1 dimensions, want 2"),
    ],
    ids=str,
)
def test_shape_error_names_what_does_not_fit(change, message):
    shapes = {"x": (2, 4), "weight": (3, 4), "bias": (3,), "lora_a": (2, 4), "lora_b": (3, 2), **change}
    with pytest.raises(lc.ShapeError, match=message):
        lora_linear(*(torch.randn(s) for s in shapes.values()), 1.0)
