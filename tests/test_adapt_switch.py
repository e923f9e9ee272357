"""Switching, disabling and deleting adapters."""

import pytest
import torch
from models import TinyDecoder, randomise, tokens
from torch import nn

import lora_core as lc
from lora_core.adapt.walk import adapter_layers, adapter_names


@pytest.fixture
def model():
    """A model with adapters "one" and "two" on different layers, "two" active."""
    model = TinyDecoder()
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]), "one")
    lc.add_adapter(model, lc.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], modules_to_save=["norm"]), "two")
    randomise(model)
    return model.eval()


def outputs(model, *choices):
    result = []
    for choice in choices:
        lc.set_adapter(model, choice)
        result.append(model(tokens()).detach())
    return result


def test_switching_changes_the_output_and_back(model):
    one, two, both, again = outputs(model, "one", "two", ["one", "two"], "one")
    assert torch.equal(one, again)
    assert not torch.equal(one, two) and not torch.equal(one, both) and not torch.equal(two, both)


def test_no_adapter_runs_the_base_model(model):
    with lc.disable_adapter(model):
        base = model(tokens())
    assert torch.equal(outputs(model, [])[0], base)


def test_switching_trains_the_active_adapter_only(model):
    lc.set_adapter(model, "one")
    assert {n.split(".")[-1] for n, p in model.named_parameters() if p.requires_grad} == {"one"}
    lc.set_adapter(model, "two")
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert "norm.copies.two.weight" in trained and not any(n.endswith("one") for n in trained)


def test_disabling_runs_the_original_of_a_module_that_is_trained_whole(model):
    with lc.disable_adapter(model):
        base = model(tokens())
    nn.init.constant_(model.norm.copies["two"].weight, 3)
    with lc.disable_adapter(model):
        assert torch.equal(model(tokens()), base)


def test_disabling_restores_even_after_an_error(model):
    before = model(tokens())
    with pytest.raises(RuntimeError, match="inside"), lc.disable_adapter(model):
        assert not torch.equal(model(tokens()), before)
        raise RuntimeError("inside")
    assert torch.equal(model(tokens()), before)


def test_disabling_nests(model):
    before = model(tokens())
    with lc.disable_adapter(model):
        with lc.disable_adapter(model):
            pass
        assert not torch.equal(model(tokens()), before)
    assert torch.equal(model(tokens()), before)


def test_disabling_takes_merged_adapters_out_for_the_while():
    model = TinyDecoder().eval()
    base = model(tokens())
    lc.add_adapter(model, lc.LoraConfig(target_modules="all-linear"))
    randomise(model)
    lc.merge_adapter(model)
    merged = model(tokens())
    with lc.disable_adapter(model):
        assert torch.equal(model(tokens()), base)
    assert torch.equal(model(tokens()), merged)


def test_deleting_one_of_three_leaves_both_others_active():
    model = TinyDecoder()
    for name, target in (("a", "q_proj"), ("b", "v_proj"), ("c", "up_proj")):
        lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=[target]), name)
    lc.set_adapter(model, ["a", "b", "c"])
    lc.delete_adapter(model, "a")
    trained = {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"b", "c"}


def test_deleting_brings_the_plain_layers_back(model):
    with lc.disable_adapter(model):
        base = model(tokens())
    one = outputs(model, "one")[0]
    lc.delete_adapter(model, "two")
    assert adapter_names(model) == ["one"]
    assert torch.equal(model(tokens()), one)
    assert type(model.layers[0].down_proj) is nn.Linear and type(model.norm) is nn.LayerNorm
    lc.delete_adapter(model, "one")
    assert not adapter_layers(model)
    assert torch.equal(model(tokens()), base)


@pytest.mark.parametrize("verb", [lc.set_adapter, lc.delete_adapter, lc.merge_adapter, lc.merge_and_unload])
def test_an_unknown_adapter_is_refused_naming_the_known(model, verb):
    with pytest.raises(lc.AdapterError, match=r"'three'.*\['one', 'two'\]"):
        verb(model, "three")


def test_disabling_a_model_without_adapters_is_refused():
    with pytest.raises(lc.AdapterError, match="no adapters"), lc.disable_adapter(TinyDecoder()):
        pass


@pytest.mark.parametrize("verb", ["set", "delete", "add"])
def test_changing_adapters_while_merged_is_refused(model, verb):
    lc.merge_adapter(model)
    with pytest.raises(lc.AdapterError, match="while .*two.* merged.*unmerge_adapter"):
        if verb == "set":
            lc.set_adapter(model, "one")
        elif verb == "delete":
            lc.delete_adapter(model, "one")
        else:
            lc.add_adapter(model, lc.LoraConfig(target_modules=["q_proj"]), "three")


def test_train_and_eval_change_nothing_but_the_mode(model):
    lc.set_adapter(model, "one")
    state = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    model.train().eval().train()
    assert all(torch.equal(p, state[n][0]) and p.requires_grad == state[n][1] for n, p in model.named_parameters())


def test_naming_an_adapter_twice_or_by_a_number_is_refused():
    model = lc.add_adapter(TinyDecoder(), lc.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(lc.AdapterError, match="'default' is named twice"):
        lc.set_adapter(model, ["default", "default"])
    with pytest.raises(lc.AdapterError, match="adapter names 5: want the name"):
        lc.set_adapter(model, 5)


def test_deleting_an_adapter_leaves_the_others_active_that_trained_the_same_module():
    model = TinyDecoder()
    for name in ("a", "b"):
        lc.add_adapter(model, lc.LoraConfig(modules_to_save=["norm"]), name)
    lc.delete_adapter(model, "a")
    assert model.norm.running() is model.norm.copies["b"] and model.norm.weight.requires_grad


def test_adapters_that_train_one_module_as_a_whole_cannot_run_together():
    """What one of them has learned would be left out."""
    model = TinyDecoder()
    for name in ("a", "b"):
        lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]), name)
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["q_proj"]), "c")
    for verb in (lc.set_adapter, lc.merge_adapter, lc.merge_and_unload):
        with pytest.raises(lc.AdapterError, match="'b' and 'a' each have a copy of 'norm', .*choose one of them"):
            verb(model, ["b", "c", "a"])
    lc.set_adapter(model, ["c", "a"])
    assert model.norm.running() is model.norm.copies["a"]
