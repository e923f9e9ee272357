"""causal_attention's compiled loops: within its bounds, whatever the sizes and the memory of what they are given."""

import attention_bounds as bounds
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds, values
from tolerance import UNIT_FP32

pytest.importorskip("numba")

from lora_core.cpu import causal_attention, compiled
from lora_core.ops.causal_attention import causal_attention as operation
from lora_core.ops.causal_attention import is_better
from lora_core.reference import causal_attention as reference

LOOPS = compiled.load("causal_attention")
# one and two vectors, more than a panel, and a panel and more
sizes = st.sampled_from([LOOPS.LANES, 2 * LOOPS.LANES, LOOPS.WIDTH, LOOPS.WIDTH + LOOPS.LANES])
# one, odd, either side of a panel's columns and of how many queries are taken at a time
tokens = st.sampled_from([1, 2, 3, 5, 31, LOOPS.WIDTH - 1, LOOPS.WIDTH, LOOPS.WIDTH + 1, 2 * LOOPS.QUERIES + 7])


@pytest.fixture(autouse=True)
def _only_loops(monkeypatch):
    """Let nothing be computed by the reference, however few elements there are."""

    def fail(*_):
        raise AssertionError("the reference was asked")

    monkeypatch.setattr(reference, "causal_attention", fail)
    monkeypatch.setattr(reference, "backward", fail)
    monkeypatch.setattr(compiled, "load_for", lambda name, _: compiled.load(name))


def heads(batch, count, length, size, scale, seed, by_token):
    made = values(batch * count * length * size, torch.float32, scale, seed)
    if by_token:
        return made.view(batch, length, count, size).transpose(1, 2)
    return made.view(batch, count, length, size)


def both(q, k, v, d_o, scale):
    """Return o, and the gradients."""
    made = causal_attention.causal_attention(q, k, v, scale)
    return made, causal_attention.causal_attention_backward(d_o, q, k, v, scale)


@given(
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(1, 3),
    tokens,
    sizes,
    sizes,
    st.sampled_from([0.125, 0.3, 1.0]),
    st.sampled_from([0.0, 1e-40, 1e-3, 1.0, 3.0]),
    st.booleans(),
    seeds,
)
def test_is_within_its_bounds(batch, groups, shared, length, d, e, scale, factor, by_token, seed):
    q = heads(batch, groups * shared, length, d, factor, seed, by_token)
    k, v = (heads(batch, groups, length, n, 1.0, seed + i, by_token) for i, n in enumerate((d, e), 1))
    d_o = heads(batch, groups * shared, length, e, 1.0, seed + 3, not by_token)
    o, grads = both(q, k, v, d_o, scale)
    bounds.check_forward(o, q, k, v, scale)
    bounds.check_backward(grads, d_o, q, k, v, scale)


def test_few_queries_are_taken_at_a_time_where_there_are_many_keys():
    """As of thousands of tokens: the scores of all queries that are taken at a time are to stay in a cache."""
    queries, columns = LOOPS._taken_at_once.py_func(10_000)
    assert queries % LOOPS.ROWS == 0 and queries * columns <= LOOPS.SCORES < (queries + LOOPS.ROWS) * columns
    assert LOOPS._taken_at_once.py_func(10**6)[0] == LOOPS.ROWS
    # of compiled code, which has these numbers in it
    length = LOOPS.SCORES // LOOPS.QUERIES
    assert LOOPS._taken_at_once.py_func(length)[0] < LOOPS.QUERIES
    q, k, v, d_o = (heads(1, 1, length, LOOPS.LANES, 1.0, i, False) for i in range(4))
    o, grads = both(q, k, v, d_o, 0.25)
    bounds.check_forward(o, q, k, v, 0.25)
    bounds.check_backward(grads, d_o, q, k, v, 0.25)


def test_a_probability_errs_by_a_few_roundings():
    """Of two keys with scores 0 and x: from where both are as likely to where one is 2^-124 likely."""
    x = -torch.linspace(0, 86, 20_011)
    q, k = torch.zeros(len(x), 1, 2, LOOPS.LANES), torch.zeros(len(x), 1, 2, LOOPS.LANES)
    q[..., 0], k[:, 0, 1, 0] = 1, x
    v = torch.zeros(len(x), 1, 2, LOOPS.LANES)
    v[:, 0, 1, 0] = 1
    p = causal_attention.causal_attention(q, k, v, 1.0)[:, 0, 1, 0].double()
    truth = x.double().sigmoid()
    off = ((p - truth) / truth).abs() / UNIT_FP32
    assert off.max() <= 6 and off.square().mean().sqrt() <= 1.5


def test_what_is_below_the_least_number_is_0_and_nothing_overflows():
    q, k, v = (torch.zeros(1, 1, 4, LOOPS.LANES) for _ in range(3))
    q[..., 0], k[0, 0, :, 0] = 1, torch.tensor([100.0, -1e30, 1e30, 1e30])
    v[0, 0, :, 0] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    o, grads = both(q, k, v, v, 1.0)
    # the scores times a larger scale would be no float32
    for made in (o, causal_attention.causal_attention(q, k, v, 1e9)):
        assert made[0, 0, :, 0].tolist() == [1.0, 1.0, 3.0, 3.5]
    assert all(g.isfinite().all() for g in grads)


def test_what_is_no_number_reaches_the_tokens_that_see_it_and_no_other():
    """In a query, a key and a score that is infinite; those before it are as they were."""
    for place in (0, 3, LOOPS.QUERIES + 1):
        for which, bad in ((0, float("nan")), (1, float("nan")), (1, float("inf")), (1, -float("inf"))):
            given = [heads(1, 1, 2 * LOOPS.QUERIES, LOOPS.LANES, 1.0, i, False).abs() for i in range(4)]
            clean = causal_attention.causal_attention(*given[:3], 1.0)
            given[which][0, 0, place, 1] = bad
            o = causal_attention.causal_attention(*given[:3], 1.0)
            assert torch.equal(o[:, :, :place], clean[:, :, :place])
            after = o[:, :, place : place + 1 if which == 0 else None]
            want = (
                torch.softmax(given[0] @ given[1].mT + torch.full((2 * LOOPS.QUERIES,) * 2, -torch.inf).triu(1), -1)
                @ given[2]
            )
            assert torch.equal(after.isnan(), want[:, :, place : place + after.shape[2]].isnan())
            if which == 0:
                d_q, d_k, _ = causal_attention.causal_attention_backward(given[3], *given[:3], 1.0)
                assert d_q.isnan().any(3).flatten().nonzero().flatten().tolist() == [place]
                reached = set(d_k.isnan().any(3).flatten().nonzero().flatten().tolist())
                # and keys of the queries that are taken together with it, which are multiplied by 0
                assert set(range(place + 1)) <= reached <= set(range((place // LOOPS.QUERIES + 1) * LOOPS.QUERIES))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_give_the_same_bits_every_time(count):
    q, k, v, d_o = (heads(2, 3, 130, 2 * LOOPS.LANES, 1.0, i, False) for i in range(4))
    before, threads = both(q, k, v, d_o, 0.2), torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        after = both(q, k, v, d_o, 0.2)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(before[0], after[0]) and all(map(torch.equal, before[1], after[1]))


def test_takes_a_sign_that_is_a_bit_a_stride_of_0_and_another_default_dtype():
    q, k, v, d_o = (heads(2, 2, 9, LOOPS.LANES, 1.0, i, True) for i in range(4))
    k, v = torch._neg_view(k), v[:1, :1].expand(2, 2, -1, -1)
    torch.set_default_dtype(torch.float64)
    try:
        o, grads = both(q, k, v, d_o, 0.2)
    finally:
        torch.set_default_dtype(torch.float32)
    bounds.check_forward(o, q, k.resolve_neg(), v, 0.2)
    bounds.check_backward(grads, d_o, q, k.resolve_neg(), v, 0.2)


def test_takes_heads_whose_numbers_do_not_lie_side_by_side():
    q, k, v = (heads(2, 2, 9, LOOPS.LANES, 1.0, i, False).mT.contiguous().mT for i in range(3))
    # as the gradient of a sum
    d_o = torch.ones(()).expand(2, 2, 9, LOOPS.LANES)
    o, grads = both(q, k, v, d_o, 0.2)
    bounds.check_forward(o, q, k, v, 0.2)
    bounds.check_backward(grads, d_o, q, k, v, 0.2)


def test_says_what_the_loops_take():
    q = torch.randn(2, 4, 5, LOOPS.LANES)
    assert causal_attention.loops_for(q, q, 0.1) is LOOPS
    assert all(causal_attention.loops_for(q, q, scale) is None for scale in (-0.1, 0.0, 1e39, float("nan")))
    assert causal_attention.loops_for(q.bfloat16(), q.bfloat16(), 0.1) is None
    assert causal_attention.loops_for(q[:, :, :0], q[:, :, :0], 0.1) is None
    odd = q[..., : LOOPS.LANES - 1]
    assert causal_attention.loops_for(odd, q, 0.1) is None and causal_attention.loops_for(q, odd, 0.1) is None


@pytest.mark.parametrize(
    ("batch", "threads", "better"), [(1, 1, True), (1, 2, False), (2, 2, True), (3, 2, False), (5, 2, True)]
)
def test_is_left_to_pytorch_where_threads_would_wait(batch, threads, better, monkeypatch):
    """They share heads of keys, of which there may be few."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    q, k = torch.randn(batch, 4, 256, 64), torch.randn(batch, 1, 256, 64)
    assert is_better(q, k, k, 0.1) == better
    assert not is_better(q.double(), k.double(), k.double(), 0.1)
    assert not is_better(*(t.to("meta") for t in (q, k, k)), 0.1)


def test_is_left_to_pytorch_by_sizes_alone(monkeypatch):
    """Not by whether loops are loaded: a checkpointed forward that is made anew has to keep what it kept before."""
    asked = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(compiled, "load_for", lambda name, scores: asked.append(scores) or LOOPS)
    few, some = (torch.randn(2, 4, length, 64) for length in (181, 182))
    assert not is_better(few, few, few, 0.1) and not is_better(some, some, some[..., :48], 0.1) and not asked
    short = torch.randn(9, 2, causal_attention.LONG - 1, 64)
    assert not is_better(short, short, short, 0.1) and not asked
    assert is_better(some, some, some, 0.1) and asked == [2 * 4 * 182**2]
    # from so many on they are loaded at once
    assert asked[0] >= compiled.WORTHWHILE


def test_operation_runs_the_loops_and_their_gradients():
    q, k, v, d_o = (heads(1, 2, 40, LOOPS.LANES, 1.0, i, True) for i in range(4))
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    o = operation(*leaves)
    grads = torch.autograd.grad(o, leaves, d_o)
    bounds.check_forward(o.detach(), q, k, v, LOOPS.LANES**-0.5)
    bounds.check_backward(grads, d_o, q, k, v, LOOPS.LANES**-0.5)
