"""causal_attention: its formula and gradients, their rounding bounds, what it refuses, how it goes with PyTorch."""

import importlib
import math

import attention_bounds as bounds
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds, values
from tolerance import assert_same_function
from torch.autograd import forward_ad

from lora_core.errors import ConfigError, DeviceError, DtypeError, ShapeError
from lora_core.ops import eager
from lora_core.ops.causal_attention import causal_attention, fit_together
from lora_core.reference import causal_attention as reference

OPS = torch.ops.lora_core
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# key heads and queries that share one, elements of a key and of a value
HEADS = pytest.mark.parametrize("heads", [(3, 1, 4, 4), (1, 3, 4, 2), (2, 2, 3, 5)], ids=str)
MODULE = importlib.import_module("lora_core.ops.causal_attention")


def operands(heads=(2, 2, 3, 5), dtype=torch.float64, batch=2, tokens=4, scale=1.0, seed=0, by_token=True):
    """Return q, k and v, as projections write them or head by head."""
    groups, shared, d, e = heads
    made = []
    for count, size in ((groups * shared, d), (groups, d), (groups, e)):
        t = values(batch * tokens * count * size, dtype, scale, seed + len(made))
        made.append(t.view(batch, tokens, count, size).transpose(1, 2))
    return [t if by_token else t.contiguous() for t in made]


def trained(*given, **options):
    return [t.detach().requires_grad_() for t in operands(*given, **options)]


def upstream(q, v, seed=9):
    return values(q.shape[:3].numel() * v.shape[3], q.dtype, 1.0, seed).view(*q.shape[:3], v.shape[3])


def written(q, k, v, scale=None):
    """By tokens and heads that are repeated."""
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    rows = []
    for t in range(q.shape[2]):
        s = scale * (q[:, :, t, None] * k[:, :, : t + 1]).sum(-1)
        w = (s - s.detach().amax(-1, keepdim=True)).exp()
        rows.append((w[..., None] * v[:, :, : t + 1]).sum(2) / w.sum(-1, keepdim=True))
    return torch.stack(rows, 2)


@pytest.fixture(params=["body", "dispatched", "direct"])
def way(request):
    """By the operations' bodies, by a fast path that PyTorch's dispatcher calls, and by one that is called past it."""
    runs = {MODULE.op: reference.causal_attention, MODULE.backward_op: reference.backward}
    before = {operation: eager.registered(operation._qualname, "cpu") for operation in runs}
    for operation, run in runs.items():
        eager.register(operation, "cpu", run)
        if request.param == "body":
            eager.unregister(operation, "cpu")
        elif request.param == "dispatched":
            del eager._implementations[operation, "cpu"]
    yield
    for operation, run in before.items():
        if run is None:
            eager.unregister(operation, "cpu")
        else:
            eager.register(operation, "cpu", run)


@HEADS
@pytest.mark.parametrize("scale", [None, 0.3, -2, 0])
def test_is_the_formula_and_torchs_attention(heads, scale):
    q, k, v = operands(heads)
    o = causal_attention(q, k, v, scale)
    assert_same_function(o, written(q, k, v, scale))
    if scale is None or scale > 0:
        # for others PyTorch's fused one multiplies the infinities of its mask by the scale
        assert_same_function(o, F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True))


@HEADS
def test_has_the_formulas_gradients_also_of_second_order(heads, way):
    given = trained(heads)
    d_o = upstream(given[0], given[2])
    want = torch.autograd.grad(written(*given), given, d_o)
    for create_graph in (False, True):
        found = torch.autograd.grad(causal_attention(*given), given, d_o, create_graph=create_graph)
        for got, truth in zip(found, want, strict=True):
            assert_same_function(got, truth)
            assert got.transpose(1, 2).is_contiguous()
    assert torch.autograd.gradcheck(causal_attention, given)
    assert torch.autograd.gradgradcheck(causal_attention, given)


def test_scale_reaches_second_derivatives(way):
    given = trained()
    assert torch.autograd.gradgradcheck(lambda *given: causal_attention(*given, -0.7), given)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)])
def test_gradients_that_nobody_asks_for_are_none(needed, way):
    given = operands()
    for i in needed:
        given[i].requires_grad_()
    causal_attention(*given).sum().backward()
    every = trained()
    written(*every).sum().backward()
    for i, (t, want) in enumerate(zip(given, every, strict=True)):
        assert (t.grad is not None) == (i in needed)
        if i in needed:
            assert_same_function(t.grad, want.grad)


def test_keeps_its_operands_and_nothing_else(way):
    given, kept = trained(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        causal_attention(*given)
    assert kept == [t.data_ptr() for t in given]


@pytest.mark.parametrize(
    ("heads", "dtype", "tokens"),
    [
        *(((2, 2, 3, 5), dtype, 4) for dtype in DTYPES),
        *(((3, 1, 4, 4), torch.float32, tokens) for tokens in (0, 1, 3)),
        ((1, 3, 4, 2), torch.bfloat16, 1),
    ],
    ids=str,
)
def test_operations_pass_opcheck(heads, dtype, tokens):
    q, k, v = operands(heads, dtype, tokens=tokens)
    torch.library.opcheck(OPS.causal_attention, (*(t.requires_grad_() for t in (q, k, v)), 0.5))
    d_o = upstream(q, v)
    torch.library.opcheck(OPS.causal_attention_backward, (d_o, *(t.detach() for t in (q, k, v)), 0.5))


@HEADS
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, None), (torch.bfloat16, 0.25)])
def test_compiles_in_one_graph_of_every_size(heads, dtype, scale):
    torch.compiler.reset()
    compiled = torch.compile(causal_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (4, 7):
        one, other = trained(heads, dtype, tokens=tokens), trained(heads, dtype, tokens=tokens)
        got, want = compiled(*one, scale), causal_attention(*other, scale)
        assert torch.equal(got, want) and got.stride() == want.stride()
        for o in (got, want):
            o.square().sum().backward()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(one, other, strict=True))


@HEADS
def test_takes_transforms_and_forward_mode(heads):
    given = tuple(operands(heads))

    def squares(attention):
        return lambda *given: attention(*given).square().sum()

    every = (0, 1, 2)
    found, want = (torch.func.grad(squares(f), every)(*given) for f in (causal_attention, written))
    for got, truth in zip(found, want, strict=True):
        assert_same_function(got, truth)
    tangents = tuple(t.flip(2) for t in given)
    (_, tangent), want = (torch.func.jvp(f, given, tangents) for f in (causal_attention, written))
    assert_same_function(tangent, want[1])
    many = [torch.stack((t, 2 * t)) for t in given]
    alone = torch.stack([written(*one) for one in zip(*many, strict=True)])
    assert_same_function(torch.func.vmap(causal_attention)(*many), alone)
    with forward_ad.dual_level():
        o = causal_attention(*map(forward_ad.make_dual, given, tangents))
        assert_same_function(forward_ad.unpack_dual(o).tangent, want[1])


def test_takes_a_batch_of_gradients(way):
    given = trained()
    d_os = torch.stack([upstream(given[0], given[2], seed) for seed in (1, 2)])
    found = torch.autograd.grad(causal_attention(*given), given, d_os, is_grads_batched=True)
    for i, d_o in enumerate(d_os):
        for got, want in zip(found, torch.autograd.grad(written(*given), given, d_o), strict=True):
            assert_same_function(got[i], want)


@HEADS
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_has_shapes_on_the_meta_device_and_computes_in_its_dtype_under_autocast(heads, tokens, way):
    given = operands(heads, torch.float32, tokens=tokens)
    made, found = causal_attention(*(t.to("meta") for t in given)), causal_attention(*given)
    assert made.is_meta and made.shape == found.shape
    assert made.transpose(1, 2).is_contiguous() and found.transpose(1, 2).is_contiguous()
    with torch.autocast("cpu", torch.bfloat16):
        under = causal_attention(*given)
    assert torch.equal(under, found) and under.dtype == torch.float32
    if tokens:
        bounds.check_forward(found, *given, heads[2] ** -0.5)


def test_backward_under_autocast_computes_in_the_dtype_of_its_forward(way):
    given = trained(dtype=torch.float32)
    d_o = upstream(given[0], given[2])
    with torch.autocast("cpu", torch.bfloat16):
        grads = torch.autograd.grad(causal_attention(*given), given, d_o)
    bounds.check_backward(grads, d_o, *given, 3**-0.5)


def test_result_may_be_changed_in_place(way):
    given = trained()
    causal_attention(*given).mul_(2).sum().backward()
    want = torch.autograd.grad(2 * written(*given).sum(), given)
    for t, truth in zip(given, want, strict=True):
        assert_same_function(t.grad, truth)


@pytest.mark.parametrize(("batch", "tokens"), [(0, 3), (2, 0), (0, 0)])
def test_nothing_gives_nothing(batch, tokens, way):
    q, k, v = trained(batch=batch, tokens=tokens)
    o = causal_attention(q, k, v)
    o.sum().backward()
    assert o.shape == (batch, 4, tokens, 5) and o.numel() == 0
    assert all(t.grad.shape == t.shape for t in (q, k, v))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_alone_gets_its_value(dtype):
    q, k, v = trained(dtype=dtype, tokens=1)
    o = causal_attention(q, k, v)
    assert torch.equal(o, v.repeat_interleave(2, 1))
    o.sum().backward()
    assert not q.grad.any() and not k.grad.any() and torch.equal(v.grad, torch.full_like(v, 2))


def test_what_is_no_number_reaches_the_tokens_that_see_it():
    for which in range(3):
        given = operands(tokens=6)
        clean = written(*given)
        given[which][0, 1, 3, 0] = math.nan
        o = causal_attention(*given)
        # the two query heads of a key head; a value has the column it lies in
        heads, columns = (slice(1, 2), slice(None)) if which == 0 else (slice(2, 4), slice(None))
        rows, columns = (slice(3, 4), columns) if which == 0 else (slice(3, 6), slice(0, 1) if which == 2 else columns)
        reached = torch.zeros(o.shape, dtype=torch.bool)
        reached[0, heads, rows, columns] = True
        assert o[reached].isnan().all()
        # a later value is multiplied by 0, which may or may not be no number
        unsure = torch.zeros_like(reached)
        unsure[0, heads, :3, columns] = which == 2
        assert_same_function(o[~reached & ~unsure], clean[~reached & ~unsure])


def test_an_infinite_score_is_as_in_the_formula():
    q, k, v = operands(tokens=3)
    q[:, :, 2], k[:, :, 1] = 1.0, -math.inf
    assert_same_function(causal_attention(q, k, v)[:, :, 2], written(q, k, v)[:, :, 2])
    k[:, :, 1] = math.inf
    assert causal_attention(q, k, v)[:, :, 2].isnan().all()


@HEADS
@pytest.mark.parametrize("scale", [0.3, 0.0, -0.7])
def test_other_devices_run_torchs_attention(heads, scale, monkeypatch):
    given = trained(heads)
    want = torch.autograd.grad(written(*given, scale).sum(), given)
    seen, attend = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **o: seen.append(o) or attend(*a, **o))
    causal_attention(*given, scale)
    assert seen == []
    monkeypatch.setattr(MODULE, "OWN", ())
    assert_same_function(causal_attention(*given, scale), written(*given, scale))
    found = torch.autograd.grad(causal_attention(*given, scale).sum(), given)
    assert seen == [{"is_causal": True, "scale": abs(scale) or 1.0, "enable_gqa": heads[1] > 1}] * 2
    for got, truth in zip(found, want, strict=True):
        assert_same_function(got, truth)
    low = operands(heads, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert causal_attention(*low).dtype == torch.float32
    tangents = torch.func.jvp(causal_attention, tuple(operands(heads)), tuple(given))
    assert_same_function(tangents[1], torch.func.jvp(written, tuple(operands(heads)), tuple(given))[1])


dtypes = st.sampled_from(DTYPES)
tokens = st.sampled_from([1, 2, 7, 16, 33, 65])
sizes = st.sampled_from([1, 3, 8, 16, 33])
# scores from subnormal ones to those of which the largest is all
scales = st.sampled_from([0.0, 1e-40, 1e-3, 1.0, 1.0, 30.0, 1e3])
factors = st.sampled_from([None, 0.0, 0.125, 1.0, -0.5, 4.0])


@given(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), tokens, sizes, sizes, dtypes, scales, factors,
       st.booleans(), seeds)  # fmt: skip
def test_is_within_its_bounds(batch, groups, shared, tokens, d, e, dtype, scale, factor, by_token, seed):
    q, k, v = operands((groups, shared, d, e), dtype, batch, tokens, scale, seed, by_token)
    given = [t.detach().requires_grad_() for t in (q, k, v)]
    d_o = upstream(q, v, seed + 3)
    o = causal_attention(*given, factor)
    grads = torch.autograd.grad(o, given, d_o)
    factor = d**-0.5 if factor is None else factor
    bounds.check_forward(o.detach(), q, k, v, factor)
    bounds.check_backward(grads, d_o, q, k, v, factor)


def one_by_one(a, b):
    """Return a @ b, its terms added one after another."""
    total = torch.zeros(())
    for i in range(a.shape[-1]):
        total = total + a[..., i, None] * b[..., i, None, :]
    return total


def softmax_of(product, q, k, scale, seen):
    return scale * product(q, k.mT), torch.exp


def less_before_the_scale(product, q, k, scale, seen):
    s = product(q, k.mT)
    return (s - s.where(seen, -torch.inf).amax(-1, keepdim=True)) * scale, torch.exp


def powers_of_two(product, q, k, scale, seen):
    return product(q * (scale * math.log2(math.e)), k.mT), torch.exp2


def by_steps(
    d_o,
    q,
    k,
    v,
    scale,
    product=torch.matmul,
    softmax=softmax_of,
    exponential=lambda w: w,
    see=lambda seen: seen,
    share=lambda t, shared: t.repeat_interleave(shared, 1),
    gather=lambda t, shared: t.unflatten(1, (-1, shared)).sum(2),
    mean=lambda p, d_p, d_o, o: (p * d_p).sum(-1, keepdim=True),
    of_q=1.0,
    of_k=1.0,
    of_p=lambda p: p,
):
    """Return o, d_q, d_k and d_v, in float32; every step may be another."""
    shared = q.shape[1] // k.shape[1]
    k, v = share(k, shared), share(v, shared)
    seen = see(torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril())
    s, power = softmax(product, q, k, scale, seen)
    s = s.masked_fill(~seen, -torch.inf)
    w = exponential(power(s - s.amax(-1, keepdim=True)))
    p = of_p(w / w.sum(-1, keepdim=True))
    o, d_v, d_p = product(p, v), product(p.mT, d_o), product(d_o, v.mT)
    d_s = scale * p * (d_p - mean(p, d_p, d_o, o))
    d_k = of_k * product(d_s.mT, q)
    made = (o, of_q * product(d_s, k), gather(d_k, shared), gather(d_v, shared))
    return [t.transpose(1, 2).contiguous().transpose(1, 2) for t in made]


SOUND = {
    "as the reference": {},
    "one by one": {"product": one_by_one},
    "less the largest before the scale": {"softmax": less_before_the_scale},
    "powers of two of scaled queries": {"softmax": powers_of_two},
    "the mean from the output": {"mean": lambda p, d_p, d_o, o: (d_o * o).sum(-1, keepdim=True)},
    "an exponential off by some roundings": {"exponential": lambda w: w * (1 + 2.0**-22 * torch.rand_like(w))},
}
# and the results that it must be found in
WRONG = {
    "no mask": ({"see": torch.ones_like}, "o d_q d_k d_v"),
    "a mask one too late": ({"see": lambda seen: seen.roll(-1, 1) | seen}, "o d_q d_k d_v"),
    "a mask one too early": ({"see": lambda seen: seen.tril(-1) | (torch.arange(len(seen)) == 0)}, "o d_q d_k d_v"),
    "no scale": ({"softmax": lambda product, q, k, scale, seen: softmax_of(product, q, k, 1.0, seen)}, "o d_v"),
    "no scale in dQ": ({"of_q": 2.0}, "d_q"),
    "no scale in dK": ({"of_k": 2.0}, "d_k"),
    "no mean": ({"mean": lambda p, d_p, d_o, o: 0}, "d_q d_k"),
    "a mean of dP alone": ({"mean": lambda p, d_p, d_o, o: d_p.mean(-1, keepdim=True)}, "d_q d_k"),
    "heads shared by turns": ({"share": lambda t, shared: t.repeat(1, shared, 1, 1)}, "o d_q d_k"),
    "gradients of heads by turns": ({"gather": lambda t, shared: t.unflatten(1, (shared, -1)).sum(1)}, "d_k d_v"),
    "one head's gradient": ({"gather": lambda t, shared: t[:, ::shared]}, "d_k d_v"),
    "heads' mean gradient": ({"gather": lambda t, shared: t.unflatten(1, (-1, shared)).mean(2)}, "d_k d_v"),
    "weights one percent off": ({"of_p": lambda p: 1.01 * p}, "o d_q d_k d_v"),
    "weights in half precision": ({"of_p": lambda p: p.bfloat16().float()}, "o d_v"),
    "a coarse exponential": ({"exponential": lambda w: w.half().float()}, "o d_v"),
    "a gradient one part in a thousand off": ({"of_q": 1.001, "of_k": 1.001}, "d_q d_k"),
}


def stepped(options, tokens=33):
    q, k, v = operands((2, 2, 8, 6), torch.float32, 2, tokens)
    d_o = upstream(q, v)
    return by_steps(d_o, q, k, v, 0.5, **options), (d_o, q, k, v, 0.5)


@pytest.mark.parametrize("name", SOUND)
def test_bounds_hold_for_every_sound_way(name):
    (o, *grads), given = stepped(SOUND[name])
    bounds.check_forward(o, *given[1:])
    bounds.check_backward(grads, *given)


@pytest.mark.parametrize("name", WRONG)
def test_bounds_find_what_is_wrong(name):
    options, where = WRONG[name]
    made, given = stepped(options)
    found = bounds.bounds(*given)
    for result, got in zip(bounds.RESULTS, made, strict=True):
        if result in where.split():
            with pytest.raises(AssertionError, match="off"):
                bounds.assert_within_bound(got, *found[result])


def test_checks_want_every_gradient_right_and_its_memory_by_token():
    (o, *grads), given = stepped({})
    with pytest.raises(AssertionError, match="o is"):
        bounds.check_forward(o.contiguous(), *given[1:])
    for i, name in enumerate(bounds.RESULTS[1:]):
        for wrong, said in ((grads[i].contiguous(), f"{name} is"), (1.01 * grads[i], "off"), (grads[i].double(), name)):
            with pytest.raises(AssertionError, match=said):
                bounds.check_backward([*grads[:i], wrong, *grads[i + 1 :]], *given)


def test_bounds_stay_bounds_where_scores_are_all_rounding():
    """Of 1e8, float32 does not know the last digits: any weights are right, and none above 1."""
    q, k, v = operands((1, 1, 8, 6), torch.float32, 1, 17, 1e4)
    truth, bound = bounds.bounds(upstream(q, v), q, k, v, 1.0)["o"]
    assert bound.isfinite().all() and (bound <= 2 * v.abs().double().sum(2, keepdim=True)).all()
    bounds.check_forward(causal_attention(q, k, v, 1.0), q, k, v, 1.0)


def test_says_which_shapes_fit():
    q, k, v = operands()
    assert fit_together(q, k, v) and fit_together(q, k[:, :1], v[:, :1]) and fit_together(q[:, :2], k, v)
    for wrong in ((q[:, :3], k, v), (q, k[:, :0], v[:, :0]), (q[:, :1], k, v), (q[:, :0], k, v), (q[0], k[0], v[0]),
                  (q[:1], k, v), (q[:, :, :1], k, v), (q[..., :1], k, v), (q, k[:, :1], v), (q, k, v[:, :, :1]),
                  (q, k, v[:1]), (q[..., :0], k[..., :0], v), (q, k, v[..., :0]), (q, k, v[0])):  # fmt: skip
        assert not fit_together(*wrong)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda q, k, v: (q, k, v[..., 0]), ShapeError, r"want q \[B, H, T, D\].*got .* v \(2, 2, 4\)$"),
        (lambda q, k, v: (q[:, :3], k, v), ShapeError, r"H a multiple of G.*q \(2, 3, 4, 3\), k \(2, 2, 4, 3\)"),
        (lambda q, k, v: (q[..., :0], k[..., :0], v), ShapeError, "D and E at least 1"),
        (lambda q, k, v: (q[:, :, 3:], k, v), ShapeError, "torch's scaled_dot_product_attention, with a mask"),
        (lambda q, k, v: (q[0], k[0], v[0]), ShapeError, r"pass them with \[None\]"),
        (lambda q, k, v: (q, k.double(), v), DtypeError, "q torch.float32, k torch.float64, v torch.float32"),
        (lambda q, k, v: (q.int(), k.int(), v.int()), DtypeError, "one floating dtype"),
        (lambda q, k, v: (q, k, [1.0]), DtypeError, "v is a list"),
        (lambda q, k, v: (q.to_sparse(), k, v), DtypeError, r"q\.to_dense\(\)"),
        (lambda q, k, v: (q, k.to("meta"), v), DeviceError, "k on meta"),
        (lambda q, k, v: (q, k, v, math.nan), ConfigError, "scale is nan; want a finite number, or None"),
        (lambda q, k, v: (q, k, v, -math.inf), ConfigError, "scale is -inf"),
        (lambda q, k, v: (q, k, v, 10**400), ConfigError, "scale is 1000"),
        (lambda q, k, v: (q, k, v, "small"), ConfigError, "scale is 'small'"),
        (lambda q, k, v: (q, k, v, torch.ones(2)), ConfigError, r"scale is tensor\(\[1., 1.\]\)"),
    ],
)
def test_says_what_does_not_fit(call, error, said):
    with pytest.raises(error, match=f"causal_attention: .*{said}"):
        causal_attention(*call(*operands(dtype=torch.float32)))
