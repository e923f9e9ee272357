"""What a saved adapter calls its tensors and modules, and what its configuration says."""

import copy
import json

import pytest
import torch
from checkpoints import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    adapted,
    assert_same_tensors,
    decoder,
    read,
    rewrite,
    rows,
    shared,
)
from models import tokens
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import lora_core as lc
from lora_core.adapt.walk import adapter_layers


def test_checkpoint_keys_and_configuration_are_peft_s(tmp_path):
    config = {"target_modules": ["v_proj", "embed_tokens"], "modules_to_save": ["norm"], "bias": "lora_only"}
    lc.save_adapter(adapted(decoder(), "mine", **config), tmp_path, "mine")
    tensors = load_file(tmp_path / WEIGHTS)
    parts = {"lora_A.weight": (4, 24), "lora_B.weight": (24, 4), "base_layer.bias": (24,)}
    expected = {f"{PREFIX}layers.{i}.attn.v_proj.{n}": s for i in range(3) for n, s in parts.items()}
    expected[f"{PREFIX}embed_tokens.lora_embedding_A"] = (4, 37)
    expected[f"{PREFIX}embed_tokens.lora_embedding_B"] = (24, 4)
    expected |= {f"{PREFIX}norm.{n}": (24,) for n in ("weight", "bias")}
    assert {n: tuple(t.shape) for n, t in tensors.items()} == expected
    values = read(tmp_path)
    assert values["peft_type"] == "LORA"
    assert values["inference_mode"] is True
    assert values["init_lora_weights"] is True
    assert (values["r"], values["lora_alpha"], values["bias"]) == (4, 6, "lora_only")
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert json.loads(file.metadata()["adapter_config"]) == values
    assert {p.name for p in tmp_path.iterdir()} == {CONFIG, WEIGHTS}


def test_checkpoint_all_linear_is_saved_as_names(tmp_path):
    lc.save_adapter(adapted(decoder(), target_modules="all-linear"), tmp_path)
    assert read(tmp_path)["target_modules"] == ["down_proj", "q_proj", "up_proj", "v_proj"]


def test_checkpoint_all_linear_of_some_layers_is_saved_as_whole_names(tmp_path):
    """PEFT takes no shorthand together with layers_to_transform."""
    lc.save_adapter(adapted(decoder(), target_modules="all-linear", layers_to_transform=[2]), tmp_path)
    values = read(tmp_path)
    linear = ("attn.q_proj", "attn.v_proj", "up_proj", "down_proj")
    assert values["target_modules"] == [f"layers.2.{n}" for n in linear]
    assert values["layers_to_transform"] is None


def test_checkpoint_all_linear_is_saved_as_whole_names_where_last_parts_would_choose_more(tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4)), "b": nn.Sequential(nn.LayerNorm(4))})

    lc.save_adapter(adapted(make(), target_modules="all-linear"), tmp_path)
    assert read(tmp_path)["target_modules"] == ["a.0"]
    assert list(adapter_layers(lc.load_adapter(make(), tmp_path))) == ["a.0"]


def test_checkpoint_of_a_module_with_two_names_may_hold_both_biases(tmp_path):
    lc.save_adapter(adapted(shared(), target_modules=["first"], bias="all"), tmp_path)
    wanted = lc.load_adapter(shared(), tmp_path)(rows())
    old, new = f"{PREFIX}second.base_layer.bias", f"{PREFIX}second.bias"
    rewrite(tmp_path, lambda t: t.update({new: t.pop(old)}))
    assert torch.equal(lc.load_adapter(shared(), tmp_path)(rows()), wanted)


def test_checkpoint_bias_all_keeps_plain_names_for_layers_of_another_adapter(tmp_path):
    model = adapted(decoder(), "a", target_modules=["up_proj"])
    adapted(model, "b", target_modules=["v_proj"], bias="all")
    lc.save_adapter(model, tmp_path, "b")
    names = load_file(tmp_path / WEIGHTS)
    assert f"{PREFIX}layers.0.up_proj.bias" in names
    loaded = lc.load_adapter(decoder(), tmp_path)
    lc.set_adapter(model, "b")
    assert torch.equal(loaded(tokens()), model(tokens()))
    # and into a model where that layer is wrapped
    other = lc.load_adapter(adapted(decoder(), "x", target_modules=["up_proj"]), tmp_path, "b")
    assert torch.equal(other(tokens()), model(tokens()))


def test_checkpoint_of_a_compiled_model_has_plain_names(tmp_path):
    model = adapted(decoder(), target_modules=["q_proj"])
    model.layers[0] = torch.compile(model.layers[0], backend="eager")
    lc.save_adapter(torch.compile(model, backend="eager"), tmp_path)
    assert not any("_orig_mod" in n for n in load_file(tmp_path / WEIGHTS))
    wrapped = torch.compile(decoder(), backend="eager")
    assert lc.load_adapter(wrapped, tmp_path) is wrapped
    assert torch.equal(wrapped._orig_mod(tokens()), adapted(decoder(), target_modules=["q_proj"])(tokens()))


def test_checkpoint_of_a_data_parallel_model_has_plain_names(tmp_path):
    model = adapted(decoder(), target_modules=["q_proj"])
    lc.save_adapter(nn.DataParallel(model), tmp_path / "wrapped")
    lc.save_adapter(model, tmp_path / "plain")
    assert_same_tensors(tmp_path / "wrapped", tmp_path / "plain")


def test_saved_weights_are_as_readable_as_their_configuration(tmp_path):
    model = lc.add_adapter(nn.Sequential(nn.Linear(4, 4)), lc.LoraConfig(r=2, target_modules=["0"]))
    lc.save_adapter(model, tmp_path)
    assert (tmp_path / WEIGHTS).stat().st_mode == (tmp_path / CONFIG).stat().st_mode


def test_whole_modules_alone_keep_their_configuration(tmp_path):
    config = lc.LoraConfig(modules_to_save=["2"], bias="all", r=3, task_type="FEATURE_EXTRACTION", extra={"foo": 1})
    model = lc.add_adapter(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)), config)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "0.bias", "2.copies.default.weight", "2.copies.default.bias",
    }  # fmt: skip
    lc.save_adapter(model, tmp_path)
    written = read(tmp_path)
    assert (written["r"], written["bias"], written["task_type"], written["foo"]) == (3, "all", "FEATURE_EXTRACTION", 1)


@pytest.mark.parametrize("config", [{}, {"layers_to_transform": [0], "layers_pattern": "layers"}], ids=["all", "some"])
def test_checkpoint_names_no_module_that_ends_like_a_target(config, tmp_path):
    """A list means every name that ends like an entry: "proj" is "patches.proj" too."""

    def make():
        torch.manual_seed(0)
        patches, layers = (
            nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"proj": m})])}) for m in (nn.Tanh(), nn.Linear(4, 4))
        )
        layers["patches"] = patches
        return layers

    lc.save_adapter(adapted(make(), target_modules="all-linear", **config), tmp_path)
    assert list(adapter_layers(lc.load_adapter(make(), tmp_path))) == ["layers.0.proj"]


def test_checkpoint_holds_the_configuration_as_it_was_when_the_adapter_was_added(tmp_path):
    targets, ranks = ["q_proj"], {"q_proj": 3}
    model = lc.add_adapter(decoder(), lc.LoraConfig(target_modules=targets, rank_pattern=ranks))
    targets.append("v_proj")
    ranks["q_proj"] = 5
    lc.save_adapter(model, tmp_path)
    assert read(tmp_path)["target_modules"] == ["q_proj"] and read(tmp_path)["rank_pattern"] == {"q_proj": 3}
    lc.load_adapter(decoder(), tmp_path)


class InTurn(nn.Module):
    """Calls its children one after the other."""

    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


def linear():
    return nn.Linear(4, 4)


@pytest.mark.parametrize("around", ["lora_A", "lora_B", "lora_embedding_A", "original_module", "modules_to_save"])
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": r".*\.(fc|lora_A|lora_B)"},
        {"target_modules": ["fc"], "modules_to_save": ["lora_A", "lora_B"]},
        {"target_modules": ["fc"], "modules_to_save": ["gc"], "bias": "all"},
    ],
    ids=["adapted", "saved", "biases"],
)
@pytest.mark.filterwarnings("ignore:PEFT")
def test_model_whose_own_modules_are_called_as_parts_of_a_checkpoint_are(tmp_path, around, config):
    """As one that has LoRA written into it: what PEFT leaves out of names is left in where the model has it."""
    torch.manual_seed(0)
    inner = InTurn(fc=linear(), gc=linear(), lora_A=linear(), lora_B=linear())
    # beside it one whose names are the same but for what PEFT puts into its own
    twin = InTurn(base_layer=InTurn(fc=linear()), fc=linear())
    base = InTurn(**{around: inner, "twin": twin})
    model = lc.add_adapter(copy.deepcopy(base), lc.LoraConfig(r=2, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    lc.save_adapter(model, tmp_path)
    x = torch.randn(3, 4)
    assert torch.equal(lc.load_adapter(base, tmp_path)(x), model(x))
