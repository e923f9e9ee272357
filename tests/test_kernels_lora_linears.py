"""The launches of lora_linears and its backward against float64: on a GPU, or on the CPU in Triton's interpreter."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_bounds import check_backward_of_several, check_forward
from strategies import dropouts, dtype_pairs, linear_operands, seeds, values

import lora_core as lc
from lora_core.kernels.crossover import PATHS
from lora_core.kernels.lora_linears import launch_lora_linears, launch_lora_linears_backward
from lora_core.ops.packed import Packed, dense, flatten

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# above 64 rows NF4 weights are no longer decoded in the product
rows = st.sampled_from([1, 7, 33, 65])
columns = st.sampled_from([1, 16, 35, 65])
members = st.lists(st.tuples(st.sampled_from([1, 9, 33, 65]), st.sampled_from([1, 3, 16, 40])), min_size=1, max_size=3)
paths = st.sampled_from(PATHS)
packings = st.lists(st.booleans(), min_size=3, max_size=3)


def operands(m, k, shapes, dtypes, packed, dropout, seed):
    """x, the launch's other arguments, and each layer as the bounds take it: W, b, A, B, s, p, seed."""
    x = linear_operands(m, 1, k, 1, *dtypes, seed, DEVICE)[0]
    weights, layers = [], []
    for i, (n, r) in enumerate(shapes):
        _, weight, bias, lora_a, lora_b = linear_operands(1, n, k, r, *dtypes, seed + 4 * i, DEVICE)
        w = Packed.of(lc.quantize_nf4(weight.float(), 32 << i, bool(i % 2)).to(DEVICE)) if packed[i] else weight
        weights.append(w)
        mask = torch.tensor([seed + i], device=DEVICE)
        bias = bias if i != 1 else None
        # without dropout in every layer
        layers.append((dense(w, dtypes[0]), bias, lora_a, lora_b, 0.5 - i, dropout if i != 2 else 0.0, mask))
    columns = list(zip(*layers, strict=True))
    biases = [x.new_empty(0) if b is None else b for b in columns[1]]
    return x, (*flatten(weights), biases, *map(list, columns[2:])), layers


@given(rows, columns, members, dtype_pairs, packings, dropouts, paths, seeds)
def test_lora_linears_kernels_match_the_formula(m, k, shapes, dtypes, packed, dropout, path, seed):
    x, rest, layers = operands(m, k, shapes, dtypes, packed, dropout, seed)
    *ys, hidden = launch_lora_linears(x, *rest, path=path)
    assert {y.dtype for y in ys} == {dtypes[0]} and hidden.dtype == dtypes[1]
    for y, s, layer in zip(ys, hidden.split([r for _, r in shapes], 1), layers, strict=True):
        check_forward(y, x, *layer, s, "either")


@given(rows, columns, members, dtype_pairs, packings, dropouts, paths, seeds)
def test_lora_linears_backward_kernels_match_the_formula(m, k, shapes, dtypes, packed, dropout, path, seed):
    x, (tensors, formats, _, *rest), layers = operands(m, k, shapes, dtypes, packed, dropout, seed)
    lora_as, lora_bs, *rest = rest
    d_ys = [values(m * n, dtypes[0], 1.0, seed + i).view(m, n).to(DEVICE) for i, (n, _) in enumerate(shapes)]
    ranks = [r for _, r in shapes]
    hidden = values(m * sum(ranks), dtypes[1], 1.0, seed + 2).view(m, sum(ranks)).to(DEVICE)
    arguments = (d_ys, x, tensors, formats, lora_as, lora_bs, hidden, *rest)
    d_x, d_lora_a, *d_lora_bs = launch_lora_linears_backward(*arguments, True, True, path)
    checked = [
        (w, a, b, s, scaling, p, mask)
        for (w, _, a, b, scaling, p, mask), s in zip(layers, hidden.split(ranks, 1), strict=True)
    ]
    pairs = list(zip(d_lora_a.split(ranks), d_lora_bs, strict=True))
    check_backward_of_several(d_x, pairs, d_ys, checked, x)
    # one without the other: dS may be summed in another order then
    only_x, *nothing = launch_lora_linears_backward(*arguments, True, False, path)
    assert nothing == [None]
    nothing, d_lora_a, *d_lora_bs = launch_lora_linears_backward(*arguments, False, True, path)
    assert nothing is None
    check_backward_of_several(only_x, list(zip(d_lora_a.split(ranks), d_lora_bs, strict=True)), d_ys, checked, x)


@pytest.mark.parametrize("lead", [(0,), (2, 3)], ids=str)
def test_lora_linears_kernels_take_any_leading_dimensions_and_strides(lead):
    x, rest, layers = operands(6, 35, [(9, 3), (5, 2), (4, 4)], (torch.float32,) * 2, [False, True, False], 0.0, 0)
    x = x.T.contiguous().T.reshape(2, 3, 35) if lead == (2, 3) else x[:0]
    *ys, hidden = launch_lora_linears(x, *rest)
    assert [y.shape for y in ys] == [(*lead, n) for n in (9, 5, 4)] and hidden.shape == (x.numel() // 35, 9)
    for y, layer in zip(ys, layers, strict=True):
        check_forward(y, x, *layer, rounded="either")
    tensors, formats, _, lora_as, lora_bs, *others = rest
    d_ys = [torch.ones_like(y) for y in ys]
    d_x, *_ = launch_lora_linears_backward(d_ys, x, tensors, formats, lora_as, lora_bs, hidden, *others, True, True)
    assert d_x.shape == x.shape


def test_lora_linears_kernels_give_the_same_bits_twice_and_run_float64_on_the_reference():
    for dtype in (torch.bfloat16, torch.float64):
        x, rest, layers = operands(70, 33, [(65, 9), (40, 16)], (dtype,) * 2, [False] * 3, 0.3, 0)
        runs = [launch_lora_linears(x, *rest) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
        for y, layer in zip(runs[0], layers, strict=False):
            check_forward(y, x, *layer, rounded="either")
        tensors, formats, _, lora_as, lora_bs, *others = rest
        arguments = (runs[0][:-1], x, tensors, formats, lora_as, lora_bs, runs[0][-1], *others, True, True)
        runs = [launch_lora_linears_backward(*arguments) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
