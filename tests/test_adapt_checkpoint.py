"""Saving and loading adapters: every kind of layer comes back, and what was trained stays as it was."""

import copy
import json

import pytest
import torch
from checkpoints import (
    CONFIG,
    KINDS,
    PREFIX,
    WEIGHTS,
    adapted,
    assert_same_state,
    assert_same_tensors,
    conv1d,
    decoder,
    half,
    read,
    rows,
    saved,
    scramble,
    state,
    trained,
    wide,
)
from models import randomise, tokens
from safetensors.torch import load_file, save_file
from torch import nn

import lora_core as lc
from lora_core.adapt.walk import adapter_layers, adapter_names


@pytest.fixture
def folder(tmp_path):
    return saved(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_round_trip_is_exact_bit_for_bit(kind, tmp_path):
    make, data, config = KINDS[kind]
    model = adapted(make(), **config)
    lc.save_adapter(model, tmp_path / "adapter")
    loaded = make()
    base_output = loaded(data())
    lc.load_adapter(loaded, tmp_path / "adapter")
    assert not trained(loaded)
    model.requires_grad_(False)
    assert_same_state(state(model), state(loaded))
    assert torch.equal(model(data()), loaded(data()))
    assert not torch.equal(loaded(data()), base_output)
    assert all(layer.active == ("default",) for layer in adapter_layers(loaded).values())


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_saved_again_is_the_same(kind, tmp_path):
    make, _, config = KINDS[kind]
    lc.save_adapter(adapted(make(), **config), tmp_path / "a")
    lc.save_adapter(lc.load_adapter(make(), tmp_path / "a", "other"), tmp_path / "b", "other")
    assert read(tmp_path / "a") == read(tmp_path / "b")
    assert_same_tensors(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("kind", ["all-linear", "embedding and head", "modules_to_save", "bias all", "bias lora_only"])
def test_checkpoint_loaded_for_training_trains_exactly_the_adapter(kind, tmp_path):
    make, _, config = KINDS[kind]
    model = adapted(make(), **config)
    lc.save_adapter(model, tmp_path)
    loaded = lc.load_adapter(make(), tmp_path, is_trainable=True)
    assert trained(loaded) == trained(model)
    assert trained(loaded)


def test_checkpoint_of_one_adapter_among_several(tmp_path):
    model = adapted(decoder(), "a", target_modules=["q_proj", "up_proj"], modules_to_save=["norm"])
    adapted(model, "b", r=2, target_modules=["v_proj", "q_proj"], bias="lora_only", modules_to_save=["norm"])
    # no others than are saved
    biases = {name for name in trained(model) if name.endswith(".bias") and "norm" not in name}
    assert biases == {f"layers.{i}.attn.v_proj.base_layer.bias" for i in range(3)}
    for name in "ab":
        lc.save_adapter(model, tmp_path / name, name)
    b = load_file(tmp_path / "b" / WEIGHTS)
    assert f"{PREFIX}layers.0.attn.v_proj.base_layer.bias" in b
    assert not any("up_proj" in n for n in b)
    loaded = decoder()
    for name in "ab":
        lc.load_adapter(loaded, tmp_path / name, name)
    # b's layers hold the biases that b was trained with
    for name in "ab":
        lc.set_adapter(model, name)
        lc.set_adapter(loaded, name)
        assert torch.equal(model(tokens()), loaded(tokens()))
    assert adapter_names(loaded) == ["a", "b"]


def test_checkpoint_saved_while_merged_is_the_same(tmp_path):
    model = adapted(decoder(), target_modules="all-linear")
    lc.save_adapter(model, tmp_path / "before")
    lc.merge_adapter(model)
    lc.save_adapter(model, tmp_path / "merged")
    assert_same_tensors(tmp_path / "before", tmp_path / "merged")


@pytest.mark.parametrize("autocast", [True, False])
def test_checkpoint_dtype_of_the_adapter_follows_the_base(autocast, tmp_path):
    lc.save_adapter(adapted(decoder(), target_modules=["q_proj"]), tmp_path)
    loaded = lc.load_adapter(half(), tmp_path, autocast_adapter_dtype=autocast)
    dtypes = {p.dtype for n, p in loaded.named_parameters() if "lora_" in n}
    assert dtypes == {torch.float32 if autocast else torch.bfloat16}


def test_checkpoint_model_keeps_working_after_the_loaded_adapter_is_deleted(tmp_path):
    model = decoder()
    before = state(model)
    lc.save_adapter(adapted(decoder(), target_modules="all-linear", modules_to_save=["norm"]), tmp_path)
    lc.load_adapter(model, tmp_path)
    lc.delete_adapter(model, "default")
    model.requires_grad_(True)
    assert_same_state(state(model), before)


@pytest.mark.parametrize("start", ["pissa", "olora", "pissa_niter_8"])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("make", [wide, conv1d])
def test_checkpoint_of_a_started_adapter_is_plain_lora_for_the_original_weight(make, use_rslora, start, tmp_path):
    targets = {"target_modules": ["1"]} if make is conv1d else {"target_modules": ["q_proj", "up_proj"]}
    patterns = {} if make is conv1d else {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.1.up_proj": 5}}
    model, data = make().double(), (rows().double() if make is conv1d else tokens())
    rank = 2 if make is conv1d else 4
    original = {n: m.weight.detach().clone() for n, m in model.named_modules() if hasattr(m, "weight")}
    config = {"init_lora_weights": start, "use_rslora": use_rslora, "lora_alpha": 6, **targets, **patterns}
    lc.add_adapter(model, lc.LoraConfig(r=rank, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.25).add_(0.01)
    lc.save_adapter(model, tmp_path)
    values = read(tmp_path)
    assert values["init_lora_weights"] is True
    assert values["r"] == 2 * rank
    loaded = lc.load_adapter(make().double(), tmp_path)
    for name, layer in adapter_layers(loaded).items():
        assert torch.equal(layer.weight, original[name])
        mine = adapter_layers(model)[name]
        assert layer.adapters["default"].rank == 2 * mine.adapters["default"].rank
        assert layer.adapters["default"].scaling == pytest.approx(mine.adapters["default"].scaling, rel=2**-51)
        effective = mine.read_weight() + mine.delta("default")
        error = (layer.read_weight() + layer.delta("default") - effective).abs().max()
        # sums of 2 r + 1 products in float64
        assert error <= (2 * rank + 2) * 2**-52 * 4 * effective.abs().max()
    assert (loaded(data) - model(data)).abs().max() < 1e-10
    # the adapter in memory is as it was
    assert all(layer.adapters["default"].rank in (rank, 3) for layer in adapter_layers(model).values())


def test_checkpoint_with_a_start_of_its_own_is_loaded_onto_what_the_start_left(tmp_path):
    """PEFT saves PiSSA unconverted by default: its A and B mean nothing on the whole weight."""
    model = wide()
    lc.add_adapter(model, lc.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"))
    scramble(model)
    lc.save_adapter(model, tmp_path)
    tensors = {}
    for name, layer in adapter_layers(model).items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_a["default"].detach()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_b["default"].detach()
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    (tmp_path / CONFIG).write_text(
        json.dumps({**read(tmp_path), "r": 4, "lora_alpha": 8, "init_lora_weights": "pissa"})
    )
    loaded = lc.load_adapter(wide(), tmp_path)
    assert torch.equal(loaded(tokens()), model(tokens()))


def test_checkpoint_deepcopy_of_a_loaded_model_is_independent(folder):
    model = lc.load_adapter(decoder(), folder)
    twin = copy.deepcopy(model)
    randomise(twin, 0.0)
    assert not torch.equal(twin(tokens()), model(tokens()))


def test_resumed_start_from_the_weight_is_saved_for_the_original_weight(tmp_path):
    """A state dict holds the start with the weight it was taken out of: whatever random start the new process drew."""
    base = nn.Sequential(nn.Linear(16, 12))
    config = lc.LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa_niter_1")
    first, second = (lc.add_adapter(copy.deepcopy(base), config) for _ in range(2))
    randomise(first)
    second.load_state_dict(first.state_dict())
    lc.save_adapter(first, tmp_path / "first")
    lc.save_adapter(second, tmp_path / "second")
    one, other = (load_file(tmp_path / n / WEIGHTS) for n in ("first", "second"))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    x = torch.randn(3, 16)
    with lc.disable_adapter(first), lc.disable_adapter(second):
        assert torch.equal(first(x), second(x))


class Picture(nn.Sequential):
    """Has no tokens, and says so as transformers' models of images and sound do."""

    def get_input_embeddings(self):
        raise NotImplementedError

    get_output_embeddings = get_input_embeddings


def test_checkpoint_of_a_model_without_tokens_loads(tmp_path):
    lc.save_adapter(adapted(Picture(nn.Linear(4, 4)), target_modules="all-linear"), tmp_path)
    assert list(adapter_layers(lc.load_adapter(Picture(nn.Linear(4, 4)), tmp_path))) == ["0"]
