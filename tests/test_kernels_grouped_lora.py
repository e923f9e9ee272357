"""grouped_lora: the op and its gradients, and the kernels on a GPU or in the interpreter, against float64."""

import itertools

import lora_bounds
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_bounds import units, wide
from strategies import dtype_pairs, seeds, values
from tolerance import UNIT_FP32, assert_within_bound

import lora_core as lc
from lora_core.kernels.grouped_lora import launch_grouped_lora, launch_grouped_lora_backward
from lora_core.kernels.groups import groups
from lora_core.ops.grouped_lora import backward_op, grouped_lora, op
from lora_core.reference import grouped as reference
from lora_core.reference.lora import lora_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
tokens = st.sampled_from([1, 2, 16, 17, 50])
columns = st.sampled_from([1, 7, 64, 130])
several_ranks = st.lists(st.sampled_from([0, 1, 3, 8, 16, 17, 65]), min_size=1, max_size=4)


def operands(m, n, k, ranks, dtypes, seed, base=True):
    """Rows of any adapter, a fifth or so of none."""
    dtype, low = dtypes
    shapes = ((m, k, dtype), (m, n, dtype), (sum(ranks), k, low), (n, sum(ranks), low))
    x, y, lora_a, lora_b = (
        values(rows * cols, own, 1.0, seed + i).view(rows, cols).to(DEVICE)
        for i, (rows, cols, own) in enumerate(shapes)
    )
    g = torch.Generator().manual_seed(seed)
    adapter = torch.randint(-1, len(ranks), (m,), generator=g).to(DEVICE)
    scaling = torch.randn(len(ranks), generator=g).to(DEVICE)
    return x, y if base else None, lora_a, lora_b, ranks, adapter, scaling


def doubled(x, base, lora_a, lora_b, ranks, adapter, scaling, absolute=False):
    x, base, lora_a, lora_b, scaling = wide(x, base, lora_a, lora_b, scaling)
    if absolute:
        x, lora_a, lora_b, scaling = (t.abs() for t in (x, lora_a, lora_b, scaling))
        base = None if base is None else base.abs()
    return x, base, lora_a, lora_b, ranks, adapter.cpu(), scaling


def check_forward(y, hidden, args):
    """S is rounded once, and so is the sum."""
    u, low, eta = units(y, args[2])
    truth, s = reference.forward(*doubled(*args))
    magnitude, s_magnitude = reference.forward(*doubled(*args, absolute=True))
    k, widest = args[0].shape[1], max(args[4])
    s_bound = low * s.abs() + eta + 2 * UNIT_FP32 * k**0.5 * s_magnitude
    assert_within_bound(hidden.cpu(), s, s_bound * (s_magnitude > 0))
    _, _, _, b, ranks, adapter, scaling = doubled(*args, absolute=True)
    carried = torch.zeros_like(truth)
    order, found = reference.members(ranks, adapter)
    for member in found:
        carried[order[member.rows]] = scaling[member.adapter] * member.of(s_bound) @ b[:, member.part].T
    sums = 2 * UNIT_FP32 * (k + widest + 3) ** 0.5 * magnitude
    assert_within_bound(y.cpu(), truth, u * truth.abs() + carried + sums)


def check_backward(grads, d_y, args, hidden):
    """Adapter by adapter, its rows as a layer without a base weight: nothing of the others is in its gradients."""
    x, _, lora_a, lora_b, ranks, adapter, scaling = args
    d_x, d_lora_a, d_lora_b = grads
    no_base, ends = x.new_zeros(d_y.shape[1], x.shape[1]), reference.offsets(ranks)
    begin = 0
    for g, r in enumerate(ranks):
        rows, part = (adapter == g).nonzero()[:, 0], slice(ends[g], ends[g + 1])
        s = hidden[begin : begin + len(rows) * r].view(len(rows), r)
        begin += len(rows) * r
        found = (d_x[rows], None, None, d_lora_a[part], d_lora_b[:, part])
        own = (lora_a[part], lora_b[:, part], s, scaling[g].item())
        lora_bounds.check_backward(found, d_y[rows], x[rows], no_base, *own)
    assert not d_x[adapter < 0].any()


@given(tokens, columns, columns, several_ranks, dtype_pairs, st.booleans(), seeds)
def test_grouped_lora_kernels_match_the_formula_row_by_row(m, n, k, ranks, dtypes, base, seed):
    args = operands(m, n, k, ranks, dtypes, seed, base)
    y, hidden = launch_grouped_lora(*args)
    assert y.dtype == dtypes[0] and hidden.dtype == dtypes[1]
    check_forward(y, hidden, args)


@given(tokens, columns, columns, several_ranks, dtype_pairs, seeds)
def test_grouped_lora_backward_kernels_match_the_formula(m, n, k, ranks, dtypes, seed):
    x, base, *rest = operands(m, n, k, ranks, dtypes, seed)
    hidden = values(m * max(ranks), dtypes[1], 1.0, seed + 9).to(DEVICE)
    # what lies behind the last row is in no result
    end = int(torch.tensor([*ranks, 0])[rest[3].cpu()].sum())
    hidden[end:] = float("nan")
    grads = launch_grouped_lora_backward(base, x, *rest, hidden, (True,) * 3)
    assert [g.dtype for g in grads] == [dtypes[0], dtypes[1], dtypes[1]] and all(g.is_contiguous() for g in grads)
    check_backward(grads, base, (x, None, *rest), hidden)


def test_grouped_lora_kernels_walk_every_tile_of_an_adapter():
    """Four tiles of one adapter between one row of another and of none."""
    x, base, *rest, adapter, scaling = operands(60, 20, 33, [3, 5], (torch.float32,) * 2, 0)
    adapter[:] = 1
    adapter[7], adapter[40] = 0, -1
    args = (x, base, *rest, adapter, scaling)
    y, hidden = launch_grouped_lora(*args)
    check_forward(y, hidden, args)
    check_backward(launch_grouped_lora_backward(base, x, *args[2:], hidden, (True,) * 3), base, args, hidden)


@pytest.mark.parametrize("count", [63, 64, 65, 130, 200])
def test_grouped_lora_kernels_find_a_row_s_adapter_among_many(count):
    """A search looks at 64 adapters in a step."""
    ranks = [(1, 3, 0)[g % 3] for g in range(count)]
    x, base, *rest, adapter, scaling = operands(24, 20, 9, ranks, (torch.float32,) * 2, count)
    adapter[:8] = torch.tensor([0, count - 1, count - 2, 60, 61, count // 2, -1, count], device=DEVICE)
    args = (x, base, *rest, adapter, scaling)
    y, hidden = launch_grouped_lora(*args)
    adapter[7] = -1
    check_forward(y, hidden, args)
    grads = launch_grouped_lora_backward(base, x, *args[2:], hidden, (True,) * 3)
    check_backward(grads, base, (x, None, *args[2:]), hidden)


@given(st.lists(st.integers(-3, 5), min_size=1, max_size=70), st.integers(1, 4))
def test_grouped_lora_sorts_every_row_into_one_tile(adapter, count):
    """Every row once, only rows of one adapter together, those of none and of no such adapter at the end."""
    found = groups(torch.tensor(adapter), range(count))
    assert sorted(found.order.tolist()) == list(range(len(adapter)))
    for g in range(count + 1):
        rows = found.order[found.starts[g] : found.starts[g + 1]].tolist()
        want = [i for i, a in enumerate(adapter) if (a if 0 <= a < count else count) == g]
        assert rows == want
        # an adapter has as many ranks as its number says here, and rows without one none
        assert found.s_ends[g] - (found.s_ends[g - 1] if g else 0) == len(want) * (g % count)
    assert found.tile_ends[-1] <= found.tiles


@pytest.mark.parametrize("needs", [*itertools.product((False, True), repeat=3)], ids=str)
def test_grouped_lora_backward_kernels_make_just_what_is_needed(needs):
    x, base, *rest = operands(20, 9, 33, [4, 0, 17], (torch.bfloat16,) * 2, 0)
    hidden = launch_grouped_lora(x, None, *rest)[1]
    grads = launch_grouped_lora_backward(base, x, *rest, hidden, needs)
    every = launch_grouped_lora_backward(base, x, *rest, hidden, (True,) * 3)
    for got, whole, need in zip(grads, every, needs, strict=True):
        assert torch.equal(got, whole) if need else got is None


@pytest.mark.parametrize(("n", "k", "first"), [(40, 70, 0), (48, 64, 2)], ids=["all", "adapters"])
def test_grouped_lora_kernels_take_any_strides_give_the_same_bits_twice_and_change_nothing(n, k, first):
    """All operands stored by columns, or the adapters alone, where all else can be loaded 16 bytes at once."""
    args = operands(50, n, k, [5, 16, 1], (torch.bfloat16,) * 2, 0)
    x, base, lora_a, lora_b, *rest = args
    loose = [t if i < first else t.T.contiguous().T for i, t in enumerate((x, base, lora_a, lora_b))]
    before = [t.clone() for t in loose]
    runs = []
    for _ in range(2):
        y, hidden = launch_grouped_lora(*loose, *rest)
        runs.append((y, hidden, *launch_grouped_lora_backward(loose[1], x, *loose[2:], *rest, hidden, (True,) * 3)))
    spread = hidden.repeat_interleave(2)[::2]
    runs.append((y, hidden, *launch_grouped_lora_backward(loose[1], x, *loose[2:], *rest, spread, (True,) * 3)))
    check_forward(*runs[0][:2], args)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(loose, before, strict=True))


@pytest.mark.parametrize("ranks", [[], [0, 0]], ids=str)
def test_grouped_lora_kernels_without_ranks_return_the_base(ranks):
    args = operands(5, 6, 7, ranks, (torch.float32,) * 2, 0)
    y, hidden = launch_grouped_lora(*args)
    assert torch.equal(y, args[1]) and hidden.shape == (0,)
    d_x, d_a, d_b = launch_grouped_lora_backward(y, args[0], *args[2:], hidden, (True,) * 3)
    assert torch.equal(d_x, torch.zeros_like(args[0])) and d_a.shape == (0, 7) and d_b.shape == (6, 0)


@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
def test_grouped_lora_kernels_scale_nothing_where_an_adapter_has_no_ranks_or_no_rows(factor):
    x, base, lora_a, lora_b, ranks, *_ = operands(5, 6, 7, [0, 3, 2], (torch.float32,) * 2, 0)
    adapter, scaling = torch.tensor([0, 0, 2, -1, 2]), torch.tensor([factor, factor, 0.5])
    args = (x, base, lora_a, lora_b, ranks, adapter.to(DEVICE), scaling.to(DEVICE))
    y, hidden = launch_grouped_lora(*args)
    check_forward(y, hidden, args)
    grads = launch_grouped_lora_backward(base, x, *args[2:], hidden, (True,) * 3)
    assert all(g.isfinite().all() for g in grads)
    assert not grads[1][:3].any() and not grads[2][:, :3].any()


def test_grouped_lora_kernels_take_no_rows():
    x, base, *rest = operands(1, 6, 7, [3], (torch.float32,) * 2, 0)
    rest[3] = rest[3][:0]
    y, hidden = launch_grouped_lora(x[:0], None, *rest)
    assert y.shape == (0, 6)
    grads = launch_grouped_lora_backward(y, x[:0], *rest, hidden, (True,) * 3)
    assert [tuple(g.shape) for g in grads] == [(0, 7), (3, 7), (6, 3)] and not any(g.any() for g in grads)


def test_grouped_lora_kernel_bound_rejects_a_result_1_percent_off():
    args = operands(64, 40, 33, [8, 3], (torch.bfloat16,) * 2, 0, base=False)
    y, hidden = launch_grouped_lora(*args[:-1], args[-1] * 1.01)
    with pytest.raises(AssertionError, match="rounding bound|rms"):
        check_forward(y, hidden, args)


def test_grouped_lora_is_lora_linear_with_the_rows_own_adapter():
    """Of every shape with leading dimensions, and one adapter's rows as lora_linear has them."""
    x, _, lora_a, lora_b, ranks, adapter, scaling = operands(12, 5, 8, [2, 3], (torch.float32,) * 2, 0)
    base = torch.randn(12, 5, device=DEVICE)
    y = grouped_lora(x.view(3, 4, 8), lora_a, lora_b, ranks, adapter.view(3, 4), scaling, base.view(3, 4, 5)).view(
        12, 5
    )
    weight = torch.zeros(5, 8, dtype=torch.float64)
    for g, part in ((0, slice(0, 2)), (1, slice(2, 5))):
        rows = (adapter == g).cpu()
        wide_x, a, b, s = wide(x[rows.to(DEVICE)], lora_a[part], lora_b[:, part], scaling)
        want = base.double().cpu()[rows] + lora_linear(wide_x, weight, None, a, b, s[g].item())
        magnitude = base.double().cpu()[rows].abs() + s[g].abs() * (wide_x.abs() @ a.T.abs()) @ b.T.abs()
        assert_within_bound(y.cpu()[rows], want, 2 * UNIT_FP32 * 15**0.5 * magnitude)
    assert torch.equal(y[adapter < 0], base[adapter < 0])


def test_grouped_lora_gradient_matches_finite_differences():
    x, base, lora_a, lora_b, ranks, adapter, _ = operands(6, 4, 5, [2, 0, 3], (torch.float64,) * 2, 0)
    scaling = torch.tensor([0.5, 1.0, -2.0], device=DEVICE)
    leaves = [t.double().requires_grad_() for t in (x, lora_a, lora_b, base)]
    run = lambda x, a, b, base: grouped_lora(x, a, b, ranks, adapter, scaling, base)  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_grouped_lora_passes_opcheck_and_compiles():
    x, base, *rest = operands(6, 4, 5, [2, 0, 3], (torch.float32,) * 2, 0)
    for given_base in (base, None):
        leaves = [t.clone().requires_grad_() for t in (x, rest[0], rest[1])]
        torch.library.opcheck(op, (leaves[0], given_base, *leaves[1:], *rest[2:]))
    hidden = op(x, base, *rest)[1]
    torch.library.opcheck(backward_op, (base, x, *rest, hidden, [True, False, True]))
    compiled = torch.compile(grouped_lora, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, *rest, base), grouped_lora(x, *rest, base))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_grouped_lora_can_be_traced(mode):
    """Which row has which adapter is not asked of tensors that have no values."""
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    x, base, lora_a, lora_b, ranks, *rest = operands(6, 4, 5, [2, 0, 3], (torch.float32,) * 2, 0)
    tensors = (x, lora_a, lora_b, *rest, base)

    def run(x, lora_a, lora_b, *rest):
        return grouped_lora(x, lora_a, lora_b, ranks, *rest)

    assert torch.equal(make_fx(run, tracing_mode=mode)(*tensors)(*tensors), run(*tensors))
    with FakeTensorMode() as fake:
        assert run(*map(fake.from_tensor, tensors)).shape == base.shape


def test_grouped_lora_under_autocast_is_that_of_cast_operands():
    x, base, lora_a, lora_b, ranks, adapter, scaling = operands(6, 4, 5, [2, 3], (torch.float32,) * 2, 0)
    half = [t.bfloat16() for t in (x, lora_a, lora_b, base)]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = grouped_lora(x, lora_a, lora_b, ranks, adapter, scaling, base)
    assert torch.equal(got, grouped_lora(*half[:3], ranks, adapter, scaling, half[3]))


GOOD = dict(
    x=torch.randn(3, 8),
    lora_a=torch.randn(5, 8),
    lora_b=torch.randn(4, 5),
    ranks=[2, 3],
    adapter=torch.tensor([0, -1, 1]),
    scaling=torch.ones(2),
)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ranks": [2, 2]}, lc.ShapeError, r"ranks \[2, 2\] add up to 4; lora_a has 5 rows"),
        ({"ranks": [6, -1]}, lc.ConfigError, r"ranks are \[6, -1\]; want a list of whole numbers, none below 0"),
        ({"ranks": None}, lc.ConfigError, "ranks are None; want a list"),
        ({"ranks": 5}, lc.ConfigError, "ranks are 5; want a list"),
        ({"ranks": "23"}, lc.ConfigError, "ranks are '23'; want a list"),
        ({"ranks": [2.0, 3.0]}, lc.ConfigError, r"ranks are \[2.0, 3.0\]; want a list"),
        ({"adapter": torch.tensor([0, 1])}, lc.ShapeError, r"adapter has shape \(2,\); want \(3,\)"),
        ({"adapter": torch.tensor([0, 2, 1])}, lc.ConfigError, "adapters from 0 to 2; want -1 for none, or below 2"),
        ({"adapter": torch.tensor([0.0, 1.0, 1.0])}, lc.DtypeError, "adapter torch.int64"),
        ({"scaling": torch.ones(3)}, lc.ShapeError, r"scaling has shape \(3,\); want \(2,\)"),
        ({"scaling": torch.ones(2).double()}, lc.DtypeError, "torch.float64"),
        ({"base": torch.ones(3, 5)}, lc.ShapeError, r"base has shape \(3, 5\); want \(3, 4\)"),
        ({"lora_b": torch.randn(4, 4)}, lc.ShapeError, r"lora_b \(4, 4\)"),
        ({"x": torch.randn(3, 8).half()}, lc.DtypeError, "x torch.float16"),
        ({"scaling": torch.ones(2, device="meta")}, lc.DeviceError, "scaling on meta"),
        ({"scaling": torch.ones(2, requires_grad=True)}, lc.ConfigError, "scaling requires a gradient"),
        ({"x": torch.randn(3, 0), "lora_a": torch.randn(5, 0)}, lc.ShapeError, "has a side of 0"),
        ({"lora_b": torch.randn(0, 5)}, lc.ShapeError, "has a side of 0"),
    ],
    ids=[
        "ranks",
        "rank below 0",
        "no ranks",
        "one number",
        "text",
        "float ranks",
        "rows",
        "no such adapter",
        "float ids",
        "scaling",
        "wide scaling",
        "base",
        "lora_b",
    ]
    + ["half x", "elsewhere", "trained scaling", "no K", "no N"],
)
def test_grouped_lora_refuses_operands_that_do_not_fit(change, error, message):
    if len(change) == 1 and "x" in change:
        change = change | {"lora_a": GOOD["lora_a"].bfloat16(), "lora_b": GOOD["lora_b"].bfloat16()}
    with pytest.raises(error, match=message):
        grouped_lora(**(GOOD | change))
