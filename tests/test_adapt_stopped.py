"""Verbs that are stopped half way, by an interrupt or for want of memory: the model computes what it did, and the verb
is asked again. Blocks of disable_adapter that overlap. Classes that are let go."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from models import randomise
from tolerance import assert_same_function
from torch import nn

import lora_core as lc
from lora_core.adapt import merge
from lora_core.cpu import compiled
from lora_core.layers.adapter import AdapterLayer
from lora_core.layers.linear import LoraLinear
from lora_core.layers.matrices import Matrices
from lora_core.layers.nf4_linear import LoraNF4Linear

X = torch.linspace(-1, 1, 5 * 64, dtype=torch.float64).view(5, 64)


def made(quantised=False, **config):
    """Three layers with an adapter, the last also trained whole beside it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.LayerNorm(64))
    if quantised:
        lc.quantize_model(model, skip_modules=[])
    model.double()
    with_start = {"target_modules": ["0", "1", "2"], "modules_to_save": ["3"], "r": 4, **config}
    lc.add_adapter(model, lc.LoraConfig(**with_start))
    if "init_lora_weights" not in config:
        randomise(model)
    return model.eval()


def stop_at(monkeypatch, owner, name, call, after=False):
    """Have a function stop the program at one of its calls, before it or behind it; from the next on it goes on."""
    calls, function = [0], getattr(owner, name)

    def stopping(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call and not after:
            raise KeyboardInterrupt
        result = function(*args, **kwargs)
        if calls[0] == call:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, name, stopping)


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(model, before):
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("after", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "quantised"])
def test_a_merge_that_is_stopped_leaves_every_bit_as_it_was(monkeypatch, quantised, call, after):
    model = made(quantised)
    before, wanted = bits(model), model(X)
    kind = LoraNF4Linear if quantised else LoraLinear
    with monkeypatch.context() as patch:
        stop_at(patch, kind, "write_weight", call, after)
        with pytest.raises(KeyboardInterrupt):
            lc.merge_adapter(model)
    assert same_bits(model, before) and torch.equal(model(X), wanted)
    lc.merge_adapter(model)
    lc.unmerge_adapter(model)
    assert same_bits(model, before) and torch.equal(model(X), wanted)


@pytest.mark.parametrize("after", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("where", ["write_weight", "replace"])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_merging_for_good_that_is_stopped_goes_on_when_asked_again(monkeypatch, where, call, after):
    """Each layer is merged and replaced in one: none has its update twice."""
    model = made()
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0", "2"]), "other")
    lc.set_adapter(model, "default")
    wanted = model(X)
    with monkeypatch.context() as patch:
        stop_at(patch, LoraLinear if where == "write_weight" else merge, where, call, after)
        with pytest.raises(KeyboardInterrupt):
            lc.merge_and_unload(model)
    assert_same_function(model(X), wanted)
    lc.merge_and_unload(model)
    assert_same_function(model(X), wanted)
    assert not any(isinstance(module, AdapterLayer) for module in model.modules())


@pytest.mark.parametrize("call", [1, 2, 3])
def test_deleting_a_start_that_is_stopped_goes_on_when_asked_again(monkeypatch, call):
    model = made(init_lora_weights="pissa")
    wanted = model(X)
    with lc.disable_adapter(model):
        base = model(X)
    with monkeypatch.context() as patch:
        stop_at(patch, LoraLinear, "write_weight", call, after=True)
        with pytest.raises(KeyboardInterrupt):
            lc.delete_adapter(model, "default")
    assert_same_function(model(X), wanted)
    lc.delete_adapter(model, "default")
    assert_same_function(model(X), base)
    assert not any(isinstance(module, AdapterLayer) for module in model.modules())


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_switch_that_is_stopped_leaves_the_adapters_that_ran(monkeypatch, call):
    model = made()
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0", "1", "2"]), "other")
    lc.set_adapter(model, "default")
    wanted = model(X)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    with monkeypatch.context() as patch:
        stop_at(patch, LoraLinear, "activate", call)
        with pytest.raises(KeyboardInterrupt):
            lc.set_adapter(model, "other")
    assert torch.equal(model(X), wanted)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    with monkeypatch.context() as patch:
        stop_at(patch, LoraLinear, "activate", call)
        with pytest.raises(KeyboardInterrupt):
            lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0", "1", "2"]), "third")
    assert torch.equal(model(X), wanted)
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0", "1", "2"]), "third")


@pytest.mark.parametrize("after", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("call", range(1, 7))
def test_an_adapter_whose_adding_is_stopped_leaves_nothing_beside_the_other(monkeypatch, call, after):
    """Six matrices are made: of the layer where it is stopped there may be A alone."""
    model = made()
    before, wanted = bits(model), model(X)
    with monkeypatch.context() as patch:
        stop_at(patch, Matrices, "__setitem__", call, after)
        with pytest.raises(KeyboardInterrupt):
            lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0", "1", "2"]), "other")
    assert same_bits(model, before) and torch.equal(model(X), wanted)


@pytest.mark.parametrize("merged", [False, True])
def test_blocks_that_overlap_keep_the_adapters_off_until_the_last_is_left(merged):
    """As those of two tasks, or threads, do."""
    model = made()
    with lc.disable_adapter(model):
        base = model(X)
    if merged:
        lc.merge_adapter(model)
    wanted = model(X)
    assert not torch.equal(wanted, base)
    one, two = lc.disable_adapter(model), lc.disable_adapter(model)
    one.__enter__(), two.__enter__()
    assert torch.equal(model(X), base)
    one.__exit__(None, None, None)
    assert torch.equal(model(X), base)
    two.__exit__(None, None, None)
    assert torch.equal(model(X), wanted)
    assert bool(model[0].merged) is merged
    if merged:
        lc.unmerge_adapter(model)
    lc.set_adapter(model, "default")


def test_a_copy_made_inside_a_block_has_its_adapters_on():
    model = made()
    wanted = model(X)
    with lc.disable_adapter(model):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        assert not torch.equal(model(X), wanted)
    for each in (model, *copies):
        assert torch.equal(each(X), wanted)
        lc.set_adapter(each, "default")


def test_a_class_made_in_a_function_is_let_go_with_what_its_methods_hold():
    def used():
        held = torch.zeros(3)

        class Local(nn.Module):
            def __init__(self):
                super().__init__()
                self.q_proj, self.k_proj = nn.Linear(64, 64), nn.Linear(64, 64)

            def forward(self, x):
                return self.q_proj(x) + self.k_proj(x) + held[0]

        model = lc.quantize_model(Local(), skip_modules=["k_proj"])
        lc.add_adapter(model, lc.LoraConfig(r=2, target_modules="all-linear"))
        assert lc.fuse(model).shared
        model(X.float())
        return weakref.ref(held), weakref.ref(Local)

    watched = used()
    gc.collect()
    assert [look() for look in watched] == [None, None]


def test_a_numba_that_is_half_imported_leaves_the_loops_to_numpy(monkeypatch):
    def half(name):
        raise AttributeError("partially initialized module 'numba' has no attribute 'core'")

    monkeypatch.setattr(compiled.importlib, "import_module", half)
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: True)
    with pytest.warns(RuntimeWarning, match="Numba cannot be used in this process.*half|partially initialized"):
        assert compiled.load.__wrapped__("nf4") is None
