"""Operands that are taken unchecked are such that no check refuses or converts them."""

import pytest
import torch
from torch.autograd import forward_ad

import lora_core as lc
from lora_core.ops.lora_linear import lora_linear
from lora_core.ops.packed import Packed
from lora_core.ops.ready import ready

M, N, K, R = 3, 6, 8, 2


class Subclass(torch.Tensor):
    """A class of its own may stand for anything."""


def operands(dtype=torch.float32, low=None):
    """Return the arguments of lora_linear by name, all sound."""
    low = low or dtype
    return {
        "x": torch.ones(M, K, dtype=dtype),
        "weight": torch.ones(N, K, dtype=dtype),
        "bias": torch.ones(N, dtype=dtype),
        "lora_a": torch.ones(R, K, dtype=low),
        "lora_b": torch.ones(N, R, dtype=low),
        "scaling": 2.0,
        "dropout": 0.5,
        "seed": torch.tensor([7]),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_ready_are_plain_operands_that_fit(dtype):
    given = operands(dtype)
    assert ready(**given)
    assert ready(**operands(dtype, torch.float32))
    assert ready(**given | {"bias": None, "dropout": 0.0, "seed": None})
    assert ready(**given | {"x": torch.ones(2, 0, K, dtype=dtype)})
    assert ready(**given | {"x": torch.ones(K, dtype=dtype), "lora_a": torch.nn.Parameter(given["lora_a"])})
    q = lc.quantize_nf4(given["weight"].float())
    assert ready(**given | {"weight": Packed.of(q)})


OTHERS = {
    "x": [None, torch.ones(M, K + 1), torch.ones(()), torch.ones(M, K).half(), torch.ones(M, K).as_subclass(Subclass)],
    "weight": [None, torch.ones(N + 1, K), torch.ones(K), torch.ones(N, K).half(), torch.ones(N, K, device="meta")],
    "bias": [1.0, torch.ones(N + 1), torch.ones(N, 1), torch.ones(N).half(), torch.ones(N, device="meta")],
    "lora_a": [None, torch.ones(R + 1, K), torch.ones(K, R), torch.ones(R, K).half(), torch.ones(R, K, 1)],
    "lora_b": [None, torch.ones(N, R + 1), torch.ones(R, N), torch.ones(N, R).half(), torch.ones(N, R, device="meta")],
    "scaling": [None, 2, True, float("nan"), float("inf"), torch.tensor(2.0)],
    "dropout": [None, 1, True, 1.0, -0.5, float("nan")],
    "seed": [None, 7, torch.tensor([1, 2]), torch.tensor([1.0]), torch.tensor([1], device="meta")],
}


@pytest.mark.parametrize(("name", "at"), [(name, i) for name, values in OTHERS.items() for i in range(len(values))])
def test_what_may_not_fit_is_left_to_the_checks(name, at):
    assert not ready(**operands() | {name: OTHERS[name][at]})


@pytest.mark.parametrize("name", ["x", "weight", "bias", "lora_a", "lora_b", "seed"])
def test_sparse_operands_are_refused(name):
    given = operands()
    given[name] = given[name].to_sparse()
    assert not ready(**given)
    with pytest.raises(lc.DtypeError, match=f"{name} is of layout torch.sparse_coo; want a dense tensor"):
        lora_linear(**given)


def test_no_operands_are_ready_that_only_fit_each_other():
    integers = {name: v.long() if isinstance(v, torch.Tensor) else v for name, v in operands().items()}
    empty = operands() | {"x": torch.ones(M, 0), "weight": torch.ones(N, 0), "lora_a": torch.ones(R, 0)}
    assert not ready(**integers) and not ready(**empty)


def test_ready_is_nothing_under_autocast_or_forward_mode():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not ready(**operands())
        assert lora_linear(**operands()).dtype == torch.bfloat16
    with forward_ad.dual_level():
        assert not ready(**operands())
