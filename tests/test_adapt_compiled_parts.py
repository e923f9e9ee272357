"""Layers that are compiled one by one: each runs what is in its place now, and a copy runs what is its own."""

import copy
import pickle

import pytest
import torch
from models import randomise
from torch import nn
from torch.optim.swa_utils import AveragedModel

import lora_core as lc

X = torch.linspace(-1, 1, 3 * 64, dtype=torch.float64).view(3, 64)


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).double()


def compiled(model):
    """Every layer in a wrapper of torch.compile, which has run."""
    for name, layer in list(model.named_children()):
        setattr(model, name, torch.compile(layer, backend="eager"))
    model(X)
    return model


def add(model, name="default", targets="all-linear", **config):
    lc.add_adapter(model, lc.LoraConfig(r=4, target_modules=targets, **config), name)
    randomise(model)
    return model


@pytest.fixture(autouse=True)
def _forget_graphs():
    yield
    torch._dynamo.reset()


def near(y, want):
    return (y - want).abs().max() <= 1e-12 * want.abs().max()


@pytest.mark.parametrize("targets", ["all-linear", ["0", "1"], r"\d"])
def test_an_adapter_runs_and_trains_inside_the_wrapper(targets):
    model, want = add(compiled(plain()), targets=targets), add(plain())
    assert near(model(X), want(X)) and not near(model(X), plain()(X))
    model(X).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)


def test_a_second_adapter_runs_where_the_first_was_deleted():
    model = add(compiled(plain()))
    lc.delete_adapter(model, "default")
    assert near(model(X), plain()(X))
    assert near(add(model, "second")(X), add(plain())(X))


@pytest.mark.parametrize("first", [False, True], ids=["compiled behind", "compiled before"])
def test_a_merge_for_good_counts_once(first):
    model = add(compiled(plain())) if first else compiled(add(plain()))
    want = model(X).detach()
    lc.merge_and_unload(model)
    assert near(model(X), want) and not any("lora" in name for name, _ in model.named_parameters())


def test_a_layer_trained_whole_runs_its_copy():
    model = compiled(plain())
    add(model, targets=["0"], modules_to_save=["1"])
    (weight,) = (p for n, p in model.named_parameters() if "copies" in n and n.endswith("weight"))
    before = model(X)
    with torch.no_grad():
        weight.mul_(2)
    assert not near(model(X), before)


def test_four_bits_run_in_place_of_the_dense_weight():
    model, want, x = compiled(plain()).float(), plain().float(), X.float()
    dense = want(x)
    for either in (model, want):
        lc.quantize_model(either, skip_modules=[])
    assert torch.equal(model(x), want(x)) and not torch.equal(want(x), dense)


COPIES = {
    "copied": copy.deepcopy,
    "averaged": lambda model: AveragedModel(model).module,
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("four_bit", [False, True], ids=["dense", "4 bits"])
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copy_of_fused_layers_compiled_in_place_runs_its_own_weights(duplicate, four_bit):
    model, x = plain().float(), X.float()
    if four_bit:
        lc.quantize_model(model, skip_modules=[])
    base = model(x)
    lc.fuse(add(model))
    for layer in model:
        layer.compile(backend="eager")
    want = model(x).detach()
    second = duplicate(model)
    assert torch.equal(second(x), want) and not torch.equal(base, want)
    with torch.no_grad():
        for name, parameter in second.named_parameters():
            if "lora_b" in name:
                parameter.zero_()
    # the products are others than the base's alone
    assert (second(x) - base).abs().max() <= 64 * torch.finfo(x.dtype).eps * base.abs().max()
    assert torch.equal(model(x), want)


def test_a_module_with_a_child_of_a_wrappers_name_is_no_wrapper():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self._orig_mod, self.other = nn.Linear(64, 64), nn.Linear(64, 64)

        def _initialize(self, how):
            raise AssertionError(how)

        def forward(self, x):
            return self.other(self._orig_mod(x))

    model = nn.Sequential(Own(), nn.Linear(64, 64)).double()
    add(model, targets=["1"], modules_to_save=["0"])
    assert {n for n, p in model.named_parameters() if p.requires_grad and "0." in n and "lora" not in n} == {
        f"0.copies.default.{child}.{kind}" for child in ("_orig_mod", "other") for kind in ("weight", "bias")
    }
    inner = add(nn.Sequential(Own()).double(), targets="all-linear")
    assert inner(X).requires_grad
