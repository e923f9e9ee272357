"""Mixed batches on the CPU, by one product with all adapters or by one with each."""

import pytest
import test_kernels_grouped_lora as cases
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from lora_core.cpu import grouped_lora as cpu
from lora_core.reference import grouped as reference

FLOAT32 = (torch.float32,) * 2


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(cases, "DEVICE", "cpu")


def counted(monkeypatch):
    """The reference's functions, and how often they were called."""
    calls = []
    for name in ("forward", "backward"):
        real = getattr(reference, name)
        monkeypatch.setattr(reference, name, lambda *a, real=real, name=name: calls.append(name) or real(*a))
    return calls


@given(cases.tokens, cases.columns, cases.columns, cases.several_ranks, st.booleans(), seeds)
def test_cpu_mixed_batch_matches_the_formula_row_by_row(m, n, k, ranks, base, seed):
    args = cases.operands(m, n, k, ranks, FLOAT32, seed, base=base)
    assert cpu._pays(args[0], args[2], args[3], ranks)
    y, hidden = cpu.grouped_lora(*args)
    cases.check_forward(y, hidden, args)


@given(cases.tokens, cases.columns, cases.columns, cases.several_ranks, seeds)
def test_cpu_mixed_batch_gradients_match_the_formula(m, n, k, ranks, seed):
    args = cases.operands(m, n, k, ranks, FLOAT32, seed)
    d_y, x, rest = args[1], args[0], args[2:]
    _, hidden = reference.forward(*args)
    grads = cpu.grouped_lora_backward(d_y, x, *rest, hidden, (True,) * 3)
    cases.check_backward(grads, d_y, args, hidden)


def test_cpu_mixed_batch_makes_just_the_gradients_that_are_needed():
    args = cases.operands(20, 9, 33, [4, 0, 17], FLOAT32, 0)
    _, hidden = cpu.grouped_lora(*args)
    every = cpu.grouped_lora_backward(args[1], args[0], *args[2:], hidden, (True,) * 3)
    for i in range(3):
        needs = tuple(j == i for j in range(3))
        grads = cpu.grouped_lora_backward(args[1], args[0], *args[2:], hidden, needs)
        assert torch.equal(grads[i], every[i]) and all(grads[j] is None for j in range(3) if j != i)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("what", ["lora_a", "lora_b", "scaling"])
def test_cpu_mixed_batch_keeps_an_infinite_adapter_from_the_rows_of_others(bad, what, monkeypatch):
    args = list(cases.operands(12, 6, 7, [2, 3], FLOAT32, 0))
    args[5] = torch.tensor([0, 1, -1] * 4)
    place = {"lora_a": 2, "lora_b": 3, "scaling": 6}[what]
    args[place] = args[place].clone()
    {"lora_a": args[2], "lora_b": args[3].T, "scaling": args[6]}[what][-1] = bad
    calls = counted(monkeypatch)
    y, hidden = cpu.grouped_lora(*args)
    others = args[5] != 1
    assert calls == ["forward"] and y[others].isfinite().all() and not y[~others].isfinite().all()
    d_x, d_a, d_b = cpu.grouped_lora_backward(args[1], args[0], *args[2:], hidden, (True,) * 3)
    assert d_x[others].isfinite().all() and d_a[:2].isfinite().all() and d_b[:, :2].isfinite().all()


def test_cpu_mixed_batch_goes_from_adapter_to_adapter_where_one_product_is_too_large(monkeypatch):
    calls = counted(monkeypatch)
    small, large = cases.operands(4, 8, 8, [1, 2], FLOAT32, 0), cases.operands(512, 512, 512, [64] * 4, FLOAT32, 0)
    cpu.grouped_lora(*small)
    assert calls == []
    _, hidden = cpu.grouped_lora(*large)
    cpu.grouped_lora_backward(large[1], large[0], *large[2:], hidden, (True,) * 3)
    assert calls == ["forward", "backward"]
    cpu.grouped_lora(*cases.operands(4, 8, 8, [1, 2], (torch.bfloat16,) * 2, 0))
    assert calls[-1] == "forward" and len(calls) == 3


def test_cpu_mixed_batch_keeps_an_infinite_gradient_from_other_adapters_where_d_b_alone_is_needed():
    args = list(cases.operands(12, 6, 7, [2, 3], FLOAT32, 0))
    args[5] = torch.tensor([0, 1, -1] * 4)
    _, hidden = cpu.grouped_lora(*args)
    d_y = args[1].clone()
    d_y[1] = torch.inf
    *_, d_b = cpu.grouped_lora_backward(d_y, args[0], *args[2:], hidden, (False, False, True))
    assert d_b[:, :2].isfinite().all() and not d_b[:, 2:].isfinite().all()
