"""Merging adapters by name, where the model has others: active ones, dormant starts, trained copies."""

import copy

import pytest
import torch
from models import randomise
from tolerance import assert_same_function
from torch import nn

import lora_core as lc
from lora_core.adapt.walk import merged_names


def stack():
    return nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)).double()


def two(**of_b):
    """Adapter a on the first layer, b on the last."""
    model = stack()
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0"]), "a")
    lc.add_adapter(model, lc.LoraConfig(r=2, **{"target_modules": ["2"], **of_b}), "b")
    randomise(model)
    return model


def output(model, names, x):
    active = [n for m in model.modules() for n in getattr(m, "active", None) or ()]
    lc.set_adapter(model, names)
    y = model(x).detach()
    lc.set_adapter(model, list(dict.fromkeys(active)))
    return y


X = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def test_what_is_left_of_the_active_adapters_is_merged_once_one_is_deleted():
    model = two()
    lc.set_adapter(model, ["a", "b"])
    lc.delete_adapter(model, "a")
    assert lc.merge_adapter(model).names == ("b",)


@pytest.mark.parametrize("active", ["a", "b", ["a", "b"]])
@pytest.mark.parametrize("merged", ["a", "b", ["a", "b"]])
@pytest.mark.parametrize("verb", [lc.merge_adapter, lc.merge_and_unload])
def test_merging_named_adapters_runs_these_and_no_others(active, merged, verb):
    model = two()
    wanted = output(model, merged, X)
    lc.set_adapter(model, active)
    verb(model, merged)
    assert_same_function(model(X), wanted)


def test_merging_a_named_adapter_and_unmerging_restores_what_was_active():
    model = two()
    lc.set_adapter(model, "a")
    before, state = model(X), {k: v.clone() for k, v in model.state_dict().items()}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    lc.merge_adapter(model, "b")
    assert not any(p.requires_grad for p in model.parameters())
    lc.unmerge_adapter(model)
    assert torch.equal(model(X), before)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained


def test_disabling_takes_all_that_is_merged_out_and_back():
    model = two()
    lc.set_adapter(model, "a")
    lc.merge_adapter(model, ["a", "b"])
    merged = model(X)
    with lc.disable_adapter(model):
        assert torch.equal(model(X), model[2].base_layer(model[1](model[0].base_layer(X))))
    assert torch.equal(model(X), merged)
    assert merged_names(model) == ("a", "b")


@pytest.mark.parametrize("named", [None, ["a", "b"]])
def test_unloading_what_is_merged_takes_the_names_it_was_merged_by(named):
    model = two()
    wanted = output(model, ["a", "b"], X)
    lc.merge_adapter(model, ["a", "b"])
    with pytest.raises(lc.AdapterError, match=r"\['a', 'b'\] is merged"):
        lc.merge_and_unload(model, "a")
    assert_same_function(lc.merge_and_unload(model, named)(X), wanted)


@pytest.mark.parametrize("active", ["a", "b", []])
@pytest.mark.parametrize("verb", [lc.merge_adapter, lc.merge_and_unload])
def test_merging_a_named_adapter_brings_its_own_trained_copies(active, verb):
    model = stack()
    for name in ("a", "b"):
        lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]), name)
        with torch.no_grad():
            model[2].copies[name].weight.normal_()
    randomise(model)
    wanted = output(model, "b", X)
    lc.set_adapter(model, active)
    verb(model, "b")
    assert_same_function(model(X), wanted)


def test_merging_trained_copies_alone_can_be_undone():
    model = stack()
    lc.add_adapter(model, lc.LoraConfig(modules_to_save=["2"]), "head")
    with torch.no_grad():
        model[2].copies["head"].weight.normal_()
    wanted = model(X)
    report = lc.merge_adapter(model)
    assert report.layers == {} and report.names == ("head",)
    with pytest.raises(lc.AdapterError, match="cannot add adapter 'other' while"):
        lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0"]), "other")
    assert torch.equal(model(X), wanted)
    lc.unmerge_adapter(model)
    assert torch.equal(model(X), wanted)
    assert model[2].copies["head"].weight.requires_grad


@pytest.mark.parametrize("already", [False, True])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_unloading_beside_a_dormant_start_keeps_the_original_weight(already, start):
    model = stack()
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0"], init_lora_weights=start), "p")
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0"]), "l")
    randomise(model)
    wanted = model(X)
    if already:
        lc.merge_adapter(model)
        assert_same_function(model(X), wanted)
    assert_same_function(lc.merge_and_unload(model)(X), wanted)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_second_start_splits_the_original_weight(start):
    base = stack()
    config = lc.LoraConfig(r=2, target_modules=["0"], init_lora_weights=start)
    alone = lc.add_adapter(copy.deepcopy(base), config, "q")
    both = lc.add_adapter(lc.add_adapter(copy.deepcopy(base), config, "p"), config, "q")
    wanted, got = alone[0].delta("q"), both[0].delta("q")
    assert (got - wanted).norm() < wanted.norm() / 1000
    assert_same_function(both(X), base(X))
    with lc.disable_adapter(both):
        assert_same_function(both(X), base(X))


@pytest.mark.parametrize(
    "verb",
    [
        lambda model: lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0"]), "c"),
        lambda model: lc.set_adapter(model, "b"),
        lambda model: lc.delete_adapter(model, "b"),
        lc.merge_adapter,
    ],
)
def test_changing_adapters_while_they_are_disabled_is_refused(verb):
    model = two()
    with (
        lc.disable_adapter(model),
        pytest.raises(lc.AdapterError, match="adapters are disabled: do it outside the disable_adapter block"),
    ):
        verb(model)


def test_deleting_an_adapter_freezes_the_biases_it_trained():
    model = two(bias="all")
    assert {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    lc.set_adapter(model, ["a", "b"])
    lc.delete_adapter(model, "b")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"0.lora_a.a", "0.lora_b.a"}
    lc.delete_adapter(model, "a")
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("order", [["a", "b"], ["b", "a"]], ids=str)
def test_merging_what_is_active_keeps_its_order(order):
    """Whichever has the first layer of the model."""
    model = stack()
    for name, target in (("a", "2"), ("b", "0")):
        lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=[target]), name)
    randomise(model)
    lc.set_adapter(model, order)
    wanted = model(X)
    assert lc.merge_adapter(model).names == tuple(order)
    assert_same_function(model(X), wanted)
    lc.unmerge_adapter(model)
    assert torch.equal(model(X), wanted)
    assert_same_function(lc.merge_and_unload(model)(X), wanted)
