"""What PyTorch's counter of operations says of fused layers: what it says of the same layers unfused."""

import copy

import pytest
import torch
from models import randomise
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lora_core as lc
import lora_core.ops.flops
from lora_core.ops.causal_attention import causal_attention

WIDTH, ROWS, RANK = 16, 80, 3


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24), nn.Linear(24, 8)

    def forward(self, x):
        return self.out(self.a(x) * self.b(x))


def adapted(in_four_bits=False):
    model = Pair()
    if in_four_bits:
        lc.quantize_model(model, skip_modules=[])
    lc.add_adapter(model, lc.LoraConfig(r=RANK, target_modules=["a", "b", "out"]))
    randomise(model)
    return model


def written(count):
    """The operations of the formulas: K, N of a, b and out."""
    sizes = ((WIDTH, 24), (WIDTH, 24), (24, 8))
    return sum(2 * ROWS * count(k, n, RANK) for k, n in sizes)


FORWARD = written(lambda k, n, r: n * k + r * (n + k))
# dx, dS, dA and dB, and dS A
BACKWARD = written(lambda k, n, r: n * k + 2 * r * (n + k))


@pytest.mark.parametrize("in_four_bits", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_operations_of_adapted_layers_are_counted(in_four_bits, fused, train):
    model = adapted(in_four_bits)
    if fused:
        assert len(lc.fuse(model).shared) == 1
    x = torch.randn(ROWS, WIDTH, requires_grad=train)
    with torch.set_grad_enabled(train), FlopCounterMode(display=False) as counter:
        y = model(x)
        if train:
            y.sum().backward()
    assert counter.get_total_flops() == FORWARD + train * BACKWARD


def test_operations_are_those_that_are_needed():
    """Of a frozen x no gradient is made, and of a trained weight one is."""
    x, weight = torch.randn(ROWS, WIDTH), torch.randn(24, WIDTH, requires_grad=True)
    lora_a, lora_b = torch.randn(RANK, WIDTH), torch.randn(24, RANK, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        lc.lora_linear(x, weight, None, lora_a, lora_b, 0.5).sum().backward()
    forward = 24 * WIDTH + RANK * (24 + WIDTH)
    assert counter.get_total_flops() == 2 * ROWS * (forward + 24 * WIDTH + 24 * RANK)


def test_operations_of_a_fused_model_are_those_of_pefts():
    peft = pytest.importorskip("peft")
    plain = peft.get_peft_model(Pair(), peft.LoraConfig(r=RANK, target_modules=["a", "b", "out"]))
    model = copy.deepcopy(plain)
    assert len(lc.fuse(model).swapped) == 3
    found = []
    for either in (plain, model):
        with FlopCounterMode(display=False) as counter:
            either(torch.randn(ROWS, WIDTH, requires_grad=True)).sum().backward()
        found.append(counter.get_total_flops())
    assert found == [FORWARD + BACKWARD] * 2


def test_operations_of_causal_attention_are_those_of_what_tokens_see():
    """Of the backward those that make scores anew as well."""
    heads, groups, tokens, d, e = 4, 2, 5, 6, 3
    shapes = (heads, tokens, d), (groups, tokens, d), (groups, tokens, e)
    q, k, v = (torch.randn(1, *shape, requires_grad=True) for shape in shapes)
    pairs = heads * tokens * (tokens + 1) // 2
    with FlopCounterMode(display=False) as counter:
        o = causal_attention(q, k, v)
        assert counter.get_total_flops() == 2 * pairs * (d + e)
        o.sum().backward()
    assert counter.get_total_flops() == 2 * pairs * (d + e + 3 * d + 2 * e)
