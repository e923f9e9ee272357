"""Saving and loading adapters: every kind of layer, every kind of broken file, and a process killed while saving."""

import copy
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from models import TinyDecoder, randomise, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lora_core as lc
from lora_core.adapt import files
from lora_core.adapt.configuration import REFUSED, config_from_peft, config_to_peft
from lora_core.adapt.walk import adapter_layers, adapter_names

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


class TinyVision(nn.Module):
    """Convolutions over one and two dimensions, with groups, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.mixer = nn.Conv2d(8, 8, (1, 3), groups=2, padding="same", bias=False)
        self.over_time = nn.Conv1d(8, 6, 5, dilation=2)
        self.norm = nn.BatchNorm1d(6)
        self.classifier = nn.Linear(6, 4)

    def forward(self, x):
        x = torch.relu(self.mixer(torch.relu(self.stem(x)))).flatten(2)
        return self.classifier(self.norm(self.over_time(x)).mean(-1))


class Shared(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


def decoder():
    torch.manual_seed(0)
    return TinyDecoder().eval()


def tied():
    torch.manual_seed(0)
    return TinyDecoder(tied=True).eval()


def vision():
    torch.manual_seed(0)
    return TinyVision().eval()


def shared():
    torch.manual_seed(0)
    return Shared().eval()


def half():
    return decoder().to(torch.bfloat16)


def wide():
    return decoder().double()


def nf4():
    return lc.quantize_model(decoder(), lc.NF4Config(block_size=32))


def conv1d():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), Conv1D(7, 5), nn.Linear(7, 3)).eval()


def image():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def rows():
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


KINDS = {
    "linear": (decoder, tokens, {"target_modules": ["q_proj", "v_proj"]}),
    "all-linear": (decoder, tokens, {"target_modules": "all-linear"}),
    "expression": (decoder, tokens, {"target_modules": r"layers\.\d\.attn\..*"}),
    "embedding and head": (decoder, tokens, {"target_modules": ["embed_tokens", "lm_head"]}),
    "convolutions": (vision, image, {"target_modules": ["stem", "mixer", "over_time"]}),
    "transformers' Conv1D": (conv1d, rows, {"target_modules": ["1"]}),
    "all-linear with numbers": (conv1d, rows, {"target_modules": "all-linear", "exclude_modules": ["2"]}),
    "nf4": (nf4, tokens, {"target_modules": "all-linear"}),
    "rslora": (decoder, tokens, {"target_modules": ["up_proj"], "use_rslora": True}),
    "patterns": (
        decoder,
        tokens,
        {
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"layers.0.attn.q_proj": 7, "up_proj": 3},
            "alpha_pattern": {r".*\.1\..*": 5, "q_proj": 0.5},
        },
    ),
    "some layers": (decoder, tokens, {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]}),
    "one layer of all": (decoder, tokens, {"target_modules": "all-linear", "layers_to_transform": 1}),
    "modules_to_save": (decoder, tokens, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "modules_to_save with buffers": (vision, image, {"target_modules": ["classifier"], "modules_to_save": ["norm"]}),
    "modules_to_save alone": (decoder, tokens, {"modules_to_save": ["lm_head"]}),
    "bias all": (decoder, tokens, {"target_modules": ["v_proj"], "bias": "all", "modules_to_save": ["norm"]}),
    "bias lora_only": (decoder, tokens, {"target_modules": ["v_proj"], "bias": "lora_only"}),
    "tied": (tied, tokens, {"target_modules": ["embed_tokens", "q_proj"]}),
    "two names": (shared, rows, {"target_modules": ["first"], "bias": "all"}),
    "bfloat16": (half, tokens, {"target_modules": "all-linear", "modules_to_save": ["lm_head"]}),
    "float64": (wide, tokens, {"target_modules": "all-linear"}),
}


@torch.no_grad()
def scramble(model):
    """Give all that an adapter can train other values."""
    randomise(model)
    g = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=g).to(parameter.dtype))


def adapted(model, name="default", **config):
    lc.add_adapter(model, lc.LoraConfig(**{"r": 4, "lora_alpha": 6, **config}), name)
    scramble(model)
    return model


def trained(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


def state(model):
    """All tensors of a model, with what requires gradients."""
    tensors = {n: t.detach().clone() for n, t in model.state_dict().items()}
    return tensors, trained(model), {n: type(m) for n, m in model.named_modules()}


def assert_same_state(one, other):
    assert one[1:] == other[1:]
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][n], other[0][n]) for n in one[0])


def read(folder):
    return json.loads((folder / CONFIG).read_text())


def assert_same_tensors(one, other):
    a, b = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)


def rewrite(folder, change=lambda tensors: None, config=None):
    """Write a folder's weights anew as PEFT would: without a configuration inside."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    if config is not None:
        (folder / CONFIG).write_text(json.dumps({**read(folder), **config}))


# round trips


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


def test_checkpoint_of_one_adapter_among_several(tmp_path):
    model = adapted(decoder(), "a", target_modules=["q_proj", "up_proj"], bias="lora_only", modules_to_save=["norm"])
    adapted(model, "b", r=2, target_modules=["v_proj", "q_proj"], bias="lora_only", modules_to_save=["norm"])
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


def test_checkpoint_saved_while_merged_is_the_same(tmp_path):
    model = adapted(decoder(), target_modules="all-linear")
    lc.save_adapter(model, tmp_path / "before")
    lc.merge_adapter(model)
    lc.save_adapter(model, tmp_path / "merged")
    assert_same_tensors(tmp_path / "before", tmp_path / "merged")


def test_checkpoint_into_a_merged_model_is_refused(tmp_path):
    model = adapted(decoder(), target_modules="all-linear")
    lc.save_adapter(model, tmp_path)
    lc.merge_adapter(model)
    with pytest.raises(lc.AdapterError, match="unmerge_adapter"):
        lc.load_adapter(model, tmp_path, "second")


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


# PiSSA and OLoRA become plain LoRA


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


def test_checkpoint_whose_start_cannot_be_repeated_leaves_the_weights_bit_for_bit(tmp_path):
    model = decoder()
    ranks = {"layers.1.attn.q_proj": 30}
    adapted(model, target_modules=["q_proj"], rank_pattern=ranks)
    lc.save_adapter(model, tmp_path)
    # the first layer is decomposed; the second has no 30 singular values
    rewrite(tmp_path, config={"init_lora_weights": "pissa"})
    fresh = decoder()
    before = state(fresh)
    with pytest.raises(lc.ConfigError, match="rank of at most 24"):
        lc.load_adapter(fresh, tmp_path)
    assert_same_state(state(fresh), before)


# files that do not fit


@pytest.fixture
def folder(tmp_path):
    lc.save_adapter(adapted(decoder(), target_modules=["q_proj", "v_proj"]), tmp_path / "adapter")
    return tmp_path / "adapter"


def assert_refused(folder, *words, model=None, error=lc.CheckpointError):
    """Loading fails with these words, and leaves a model that had another adapter as it was."""
    model = model or adapted(decoder(), "other", target_modules=["v_proj"], modules_to_save=["norm"])
    before = state(model)
    with pytest.raises(error) as caught:
        lc.load_adapter(model, folder, "new")
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert_same_state(state(model), before)
    assert adapter_names(model) == ["other"]
    assert all(layer.active == ("other",) for layer in adapter_layers(model).values())


def test_checkpoint_missing_keys_are_listed(folder):
    rewrite(folder, lambda t: [t.pop(n) for n in list(t) if "layers.1" in n])
    assert_refused(
        folder, "missing in the file (4)", f"{PREFIX}layers.1.attn.q_proj.lora_A.weight", "Want the base model"
    )


def test_checkpoint_unexpected_keys_are_listed_with_the_nearest(folder):
    name = f"{PREFIX}layers.1.attn.q_proj.lora_A.weight"
    rewrite(folder, lambda t: t.update({name.replace("layers.1", "layers.7"): t.pop(name)}))
    assert_refused(folder, "unexpected in the file (1)", "layers.7", f"is it {name}?", "missing in the file (1)")


def test_checkpoint_long_lists_are_cut(folder):
    rewrite(folder, lambda t: [t.pop(n) for n in list(t)[1:]])
    assert_refused(folder, "missing in the file (11)", "... and 3 more")


def test_checkpoint_wrong_shapes_are_listed(folder):
    rewrite(folder, config={"r": 5})
    assert_refused(
        folder, "wrong shape or type (12)", "lora_A.weight: [4, 24] in the file, [5, 24] in the model", "unchanged"
    )


def test_checkpoint_of_integers_is_refused(folder):
    rewrite(folder, lambda t: t.update({n: v.to(torch.int8) for n, v in t.items()}))
    assert_refused(folder, "[4, 24] int8 in the file, [4, 24] in the model")


def test_checkpoint_for_another_architecture_names_what_is_there(folder):
    with pytest.raises(lc.TargetNotFoundError, match="classifier"):
        lc.load_adapter(vision(), folder)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_checkpoint_truncated_weights_are_refused(folder, kept):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:kept])
    assert_refused(folder, WEIGHTS, "truncated", "save it again")


def test_checkpoint_foreign_weights_are_refused(folder):
    (folder / WEIGHTS).write_bytes(b"<html>not found</html>" * 10)
    assert_refused(folder, WEIGHTS, "foreign")


@pytest.mark.parametrize(("text", "word"), [('{"r": 8,', "no JSON"), ("[1]", "list"), ("", "no JSON")])
def test_checkpoint_broken_configuration_is_refused(folder, text, word):
    (folder / CONFIG).write_text(text)
    assert_refused(folder, CONFIG, word)


def test_checkpoint_pickles_are_never_read(folder):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(folder / "exploded"),))

    torch.save({"x": Bomb()}, folder / "adapter_model.bin")
    lc.load_adapter(decoder(), folder)
    (folder / WEIGHTS).unlink()
    assert_refused(folder, "adapter_model.bin", "pickle", "save_file(torch.load(", "weights_only=True")
    # a pickle under the other name is no safetensors
    shutil.copy(folder / "adapter_model.bin", folder / WEIGHTS)
    assert_refused(folder, "foreign")
    assert not (folder / "exploded").exists()


def test_checkpoint_missing_folder_and_files_are_named(folder, tmp_path):
    assert_refused(tmp_path / "user" / "adapter", "no folder", "download")
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", WEIGHTS, "holds nothing")
    rewrite(folder)
    (folder / CONFIG).unlink()
    assert_refused(folder, f"has no {CONFIG}")


def test_checkpoint_into_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(lc.CheckpointError, match="is a file"):
        lc.save_adapter(adapted(decoder(), target_modules=["q_proj"]), tmp_path / "file")


def test_checkpoint_meta_device_is_refused_both_ways(folder, tmp_path):
    with torch.device("meta"):
        model = TinyDecoder()
    with pytest.raises(lc.CheckpointError, match="meta device.*load the base weights first"):
        lc.load_adapter(model, folder)
    assert not adapter_layers(model)
    lc.add_adapter(model, lc.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(lc.CheckpointError, match="meta device"):
        lc.save_adapter(model, tmp_path / "meta")
    assert not (tmp_path / "meta").exists()


def test_checkpoint_unknown_adapter_and_taken_name_are_refused(folder, tmp_path):
    model = lc.load_adapter(decoder(), folder)
    with pytest.raises(lc.AdapterError, match="no adapter named 'x'"):
        lc.save_adapter(model, tmp_path, "x")
    with pytest.raises(lc.AdapterError, match="already"):
        lc.load_adapter(model, folder)


# what PEFT and others write besides


def test_checkpoint_extra_tensors_of_peft_are_accepted(tmp_path):
    config = {"target_modules": ["embed_tokens", "v_proj"], "modules_to_save": ["norm"], "bias": "all"}
    model = adapted(decoder(), **config)
    lc.save_adapter(model, tmp_path)
    extra = {
        "embed_tokens.base_layer.weight": model.embed_tokens.weight,
        "norm.original_module.bias": model.norm.original.bias,
        "norm.original_module.weight": model.norm.original.weight,
        "norm.modules_to_save.bias": model.norm.copies["default"].bias,
    }
    rewrite(tmp_path, lambda t: t.update({PREFIX + n: v.detach().clone() for n, v in extra.items()}))
    loaded = lc.load_adapter(decoder(), tmp_path)
    assert torch.equal(loaded(tokens()), model(tokens()))


def test_checkpoint_embedding_weights_that_differ_are_written_and_reported(tmp_path):
    model = adapted(decoder(), target_modules=["embed_tokens"])
    with torch.no_grad():
        model.embed_tokens.base_layer.weight[3] = 0.5
    lc.save_adapter(model, tmp_path)
    weight = model.embed_tokens.weight.detach()
    rewrite(tmp_path, lambda t: t.update({f"{PREFIX}embed_tokens.base_layer.weight": weight}))
    with pytest.warns(UserWarning, match="embed_tokens.weight"):
        loaded = lc.load_adapter(decoder(), tmp_path)
    assert torch.equal(loaded(tokens()), model(tokens()))


def test_checkpoint_weights_of_other_layers_are_not_accepted(folder):
    rewrite(folder, lambda t: t.update({f"{PREFIX}layers.0.up_proj.weight": torch.zeros(48, 24)}))
    assert_refused(folder, "unexpected in the file (1)", "layers.0.up_proj.weight")


def test_checkpoint_adapter_names_in_keys_are_understood(folder):
    def name_all(tensors):
        for name in list(tensors):
            tensors[name.replace(".weight", ".mine.weight")] = tensors.pop(name)

    wanted = lc.load_adapter(decoder(), folder)(tokens())
    rewrite(folder, name_all)
    assert torch.equal(lc.load_adapter(decoder(), folder)(tokens()), wanted)
    rewrite(folder, lambda t: t.update({n.replace("mine", "yours"): v + 1 for n, v in t.items()}))
    assert_refused(folder, "two different tensors", "one adapter in a file")


def test_checkpoint_modules_to_save_that_the_model_lacks_are_no_error(tmp_path):
    """PEFT lists both names that a classifier's head may have."""
    lc.save_adapter(adapted(vision(), target_modules=["stem"], modules_to_save=["classifier"]), tmp_path)
    rewrite(tmp_path, config={"modules_to_save": ["classifier", "score"], "task_type": "SEQ_CLS"})
    lc.load_adapter(vision(), tmp_path)


# configurations


def test_configuration_of_four_fields_is_enough(folder):
    rewrite(folder)
    wanted = lc.load_adapter(decoder(), folder)(tokens())
    (folder / CONFIG).write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]})
    )
    assert torch.equal(lc.load_adapter(decoder(), folder)(tokens()), wanted)


def test_configuration_unknown_fields_are_kept_written_back_and_reported(folder, tmp_path):
    extra = {"base_model_name_or_path": "tiny", "revision": "v2", "use_qalora": False, "qalora_group_size": 16}
    rewrite(folder, config={**extra, "lora_alhpa": 3, "brand_new": {"x": [1]}})
    with pytest.warns(UserWarning, match=r"brand_new, lora_alhpa \(did you mean lora_alpha\?\)"):
        model = lc.load_adapter(decoder(), folder)
    lc.save_adapter(model, tmp_path / "again")
    assert read(tmp_path / "again") == read(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    {
        "use_dora": True,
        "use_qalora": True,
        "lora_bias": True,
        "target_parameters": ["experts.w"],
        "layer_replication": [[0, 2]],
        "trainable_token_indices": [1, 2],
        "alora_invocation_tokens": [5],
        "megatron_config": {"x": 1},
        "velora_config": {"num_groups": 2},
        "monteclora_config": {},
        "kasa_config": {},
        "arrow_config": {"top_k": 1},
        "use_bdlora": {"nblocks": 2},
        "ensure_weight_tying": True,
        "enable_lora": [True, False],
    }.items(),
)
def test_configuration_fields_that_change_the_forward_are_refused(folder, name, value):
    assert name in REFUSED
    rewrite(folder, config={name: value})
    assert_refused(folder, name, "not implemented", "PEFT", error=lc.ConfigError)


@pytest.mark.parametrize("start", ["loftq", "corda", "lora_ga", "LoftQ"])
def test_configuration_starts_that_changed_the_base_weight_are_refused(folder, start):
    rewrite(folder, config={"init_lora_weights": start})
    assert_refused(folder, start, "path_initial_model_for_weight_conversion", error=lc.ConfigError)


@pytest.mark.parametrize("start", ["eva", "orthogonal", "mica", "gaussian", False])
def test_configuration_starts_that_left_the_base_weight_alone_load(folder, start):
    wanted = lc.load_adapter(decoder(), folder)(tokens())
    rewrite(folder, config={"init_lora_weights": start})
    assert torch.equal(lc.load_adapter(decoder(), folder)(tokens()), wanted)


@pytest.mark.parametrize(("given", "word"), [("IA3", "'IA3'"), ("ADALORA", "'ADALORA'"), (None, "no peft_type")])
def test_configuration_of_another_kind_of_adapter_is_refused(folder, given, word):
    rewrite(folder, config={"peft_type": given})
    assert_refused(folder, word, "LORA", error=lc.ConfigError)


def test_configuration_with_impossible_values_is_refused(folder):
    rewrite(folder, config={"r": "8"})
    assert_refused(folder, "rank", "'8'", error=lc.ConfigError)


def test_configuration_that_json_cannot_hold_is_refused(tmp_path):
    model = adapted(decoder(), target_modules=["q_proj"], extra={"where": object()})
    with pytest.raises(lc.ConfigError, match="JSON"):
        lc.save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_configuration_sets_and_tuples_are_written_as_lists():
    config = lc.LoraConfig(target_modules=("b", "a"), exclude_modules={"d", "c"})
    values = config_to_peft(config)
    assert values["target_modules"] == ["b", "a"]
    assert values["exclude_modules"] == ["c", "d"]
    assert config_to_peft(config_from_peft(values)) == values


# two files, one generation


def test_checkpoint_files_of_two_generations_are_refused(folder, tmp_path):
    lc.save_adapter(adapted(decoder(), target_modules=["q_proj", "v_proj"], lora_alpha=99), tmp_path / "new")
    shutil.copy(tmp_path / "new" / CONFIG, folder / CONFIG)
    assert_refused(folder, "not of one generation", "lora_alpha is 99", "saved with 6", f"remove {CONFIG}")
    (folder / CONFIG).unlink()
    assert adapter_layers(lc.load_adapter(decoder(), folder))["layers.0.attn.q_proj"].adapters["default"].scaling == 1.5


def test_checkpoint_configuration_may_be_edited_where_that_changes_nothing(folder, tmp_path):
    values = read(folder)
    values["base_model_name_or_path"] = "somewhere/else"
    values["lora_dropout"] = 0.5
    del values["use_rslora"]
    (folder / CONFIG).write_text(json.dumps(values))
    model = lc.load_adapter(decoder(), folder)
    assert adapter_layers(model)["layers.0.attn.q_proj"].adapters["default"].dropout == 0.5


def test_checkpoint_failed_write_leaves_the_old_one_and_no_litter(folder, monkeypatch):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_sync", full)
    with pytest.raises(lc.CheckpointError, match="No space left.*what was there is whole.*make room"):
        lc.save_adapter(adapted(decoder(), target_modules=["up_proj"]), folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_checkpoint_litter_of_a_killed_process_is_removed_once_it_is_old(folder):
    old, young = folder / f".{WEIGHTS}.0{files.PARTIAL}", folder / f".{WEIGHTS}.1{files.PARTIAL}"
    for path in (old, young):
        path.write_bytes(b"half")
    long_ago = time.time() - 2 * files.STALE_SECONDS
    os.utime(old, (long_ago, long_ago))
    lc.save_adapter(adapted(decoder(), target_modules=["q_proj"]), folder)
    assert not old.exists()
    assert young.exists()


# One process that forks a saver for each moment and kills it there: before and after every call that touches the disk.
KILLED = """
import os, shutil, signal, sys, time
import torch
torch.set_num_threads(1)
import safetensors.torch
from pathlib import Path
from lora_core.adapt import files

root, moments, foreign = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "foreign"
generations = {
    g: ({"peft_type": "LORA", "r": r, "lora_alpha": 6, "target_modules": ["q_proj"]},
        safetensors.torch.load_file(root / g / "adapter_model.safetensors"))
    for g, r in (("old", 4), ("new", 7))
}

def killed_at(moment, folder):
    calls = 0
    def counted(call):
        def wrapper(*args, **kwargs):
            nonlocal calls
            for step in (lambda: None, lambda: call(*args, **kwargs)):
                result = step()
                if calls == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                calls += 1
            return result
        return wrapper
    os.replace, os.fsync = counted(os.replace), counted(os.fsync)
    safetensors.torch.save_file = counted(safetensors.torch.save_file)
    files.write_checkpoint(folder, *generations["new"])
    os._exit(0)

for moment in range(moments):
    folder = root / f"moment{moment}"
    files.write_checkpoint(folder, *generations["old"])
    if foreign:
        # as PEFT writes them: the weights say nothing of their configuration
        safetensors.torch.save_file(
            generations["old"][1], folder / "adapter_model.safetensors", metadata={"format": "pt"}
        )
    child = os.fork()
    if child == 0:
        killed_at(moment, folder)
    _, status = os.waitpid(child, 0)
    (root / f"status{moment}").write_text(str(os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0))

# and at times the code does not choose, while larger files are being written over and over
folder = root / "loop"
large = {g: {"x": torch.full((2_000_000,), float(i))} for i, g in enumerate(generations)}
files.write_checkpoint(folder, generations["old"][0], large["old"])
for attempt in range(15):
    child = os.fork()
    if child == 0:
        while True:
            for g in ("new", "old"):
                files.write_checkpoint(folder, generations[g][0], large[g])
    time.sleep(0.005 + 0.011 * attempt)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    shutil.copytree(folder, root / f"loop{attempt}")
    for path in folder.glob(".*.partial"):
        path.unlink()
    files.write_checkpoint(folder, generations["old"][0], large["old"])
"""

# a copy of the configuration and its fsync, 2 temporary files: one save_file, 2 fsyncs, 2 renames, one fsync of the
# folder; before and after each of the seven calls
MOMENTS = 14


@pytest.fixture(scope="module", params=["own", "foreign"])
def killed(tmp_path_factory, request):
    root = tmp_path_factory.mktemp("killed")
    for name, r in (("old", 4), ("new", 7)):
        lc.save_adapter(adapted(decoder(), r=r, target_modules=["q_proj"]), root / name)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", KILLED, str(root), str(MOMENTS + 1), request.param],
        check=True,
        env=environment,
        cwd=os.getcwd(),
    )
    return root


@pytest.mark.parametrize("moment", range(MOMENTS))
@pytest.mark.filterwarnings("ignore:saving to .* was interrupted")
def test_checkpoint_killed_at_any_moment_loads_whole(killed, moment, tmp_path):
    assert (killed / f"status{moment}").read_text() == "9"
    folder = tmp_path / "copy"
    shutil.copytree(killed / f"moment{moment}", folder)
    loaded = lc.load_adapter(decoder(), folder)
    # the weights' rename is the moment of truth
    expected = "old" if moment <= 10 else "new"
    wanted = lc.load_adapter(decoder(), killed / expected)
    assert torch.equal(loaded(tokens()), wanted(tokens()))
    # and it can be saved over
    lc.save_adapter(wanted, folder)
    assert torch.equal(lc.load_adapter(decoder(), folder)(tokens()), wanted(tokens()))


def test_checkpoint_killed_between_the_renames_says_so(killed):
    assert read(killed / "moment10")["r"] == 7
    with pytest.warns(UserWarning, match="interrupted.*the checkpoint before it"):
        assert files.read_checkpoint(killed / "moment10").config["r"] == 4


def test_checkpoint_moments_cover_the_whole_save(killed):
    """One moment more and the save was over: nothing that touches the disk is left out."""
    assert (killed / f"status{MOMENTS}").read_text() == "0"


@pytest.mark.filterwarnings("ignore:saving to .* was interrupted")
def test_checkpoint_killed_while_writing_is_one_generation(killed):
    seen = set()
    for attempt in range(15):
        checkpoint = files.read_checkpoint(killed / f"loop{attempt}")
        values = checkpoint.tensors["x"].unique().tolist()
        assert values == [{4: 0.0, 7: 1.0}[checkpoint.config["r"]]]
        seen |= {p.suffix for p in (killed / f"loop{attempt}").iterdir()}
    assert files.PARTIAL in seen, "no kill met a save"


def test_checkpoint_deepcopy_of_a_loaded_model_is_independent(folder):
    model = lc.load_adapter(decoder(), folder)
    twin = copy.deepcopy(model)
    randomise(twin, 0.0)
    assert not torch.equal(twin(tokens()), model(tokens()))


def test_saved_weights_are_as_readable_as_their_configuration(tmp_path):
    model = lc.add_adapter(nn.Sequential(nn.Linear(4, 4)), lc.LoraConfig(r=2, target_modules=["0"]))
    lc.save_adapter(model, tmp_path)
    assert (tmp_path / WEIGHTS).stat().st_mode == (tmp_path / CONFIG).stat().st_mode


@pytest.mark.parametrize("folder", [None, 5, "", "a\0b"], ids=repr)
def test_what_is_no_folder_is_refused(folder):
    model = lc.add_adapter(nn.Sequential(nn.Linear(4, 4)), lc.LoraConfig(r=2, target_modules=["0"]))
    for verb in (lc.save_adapter, lc.load_adapter):
        with pytest.raises(lc.CheckpointError, match="want the path of an adapter's folder"):
            verb(model, folder)


def test_folder_that_cannot_be_made_is_refused():
    model = lc.add_adapter(nn.Sequential(nn.Linear(4, 4)), lc.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(lc.CheckpointError, match="cannot make the folder"):
        lc.save_adapter(model, "/proc/nowhere")


def test_checkpoint_whose_earlier_configuration_is_gone_is_refused(tmp_path):
    """A folder that PEFT wrote, saved over by a killed process, of which the earlier configuration was not copied."""
    model = lc.add_adapter(nn.Sequential(nn.Linear(4, 4)), lc.LoraConfig(r=2, target_modules=["0"]))
    lc.save_adapter(model, tmp_path)
    shutil.copy(tmp_path / WEIGHTS, tmp_path / f".{WEIGHTS}.beef{files.PARTIAL}")
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS, metadata={"format": "pt"})
    with (
        pytest.warns(UserWarning, match="interrupted"),
        pytest.raises(lc.CheckpointError, match="the configuration of its .* is gone: put back"),
    ):
        lc.load_adapter(nn.Sequential(nn.Linear(4, 4)), tmp_path)


def test_files_that_are_folders_are_refused(tmp_path):
    model = lc.add_adapter(nn.Sequential(nn.Linear(4, 4)), lc.LoraConfig(r=2, target_modules=["0"]))
    lc.save_adapter(model, tmp_path / "a")
    (tmp_path / "a" / CONFIG).unlink()
    (tmp_path / "a" / CONFIG).mkdir()
    with pytest.raises(lc.CheckpointError, match="cannot be read"):
        lc.load_adapter(nn.Sequential(nn.Linear(4, 4)), tmp_path / "a")
    with pytest.raises(lc.CheckpointError, match="cannot save an adapter in .*what was there is whole"):
        lc.save_adapter(model, tmp_path / "a")
    assert not list((tmp_path / "a").glob(".*"))


def test_whole_modules_alone_keep_their_configuration(tmp_path):
    config = lc.LoraConfig(modules_to_save=["2"], bias="all", r=3, task_type="FEATURE_EXTRACTION", extra={"foo": 1})
    model = lc.add_adapter(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)), config)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "0.bias", "2.copies.default.weight", "2.copies.default.bias",
    }  # fmt: skip
    lc.save_adapter(model, tmp_path)
    written = read(tmp_path)
    assert (written["r"], written["bias"], written["task_type"], written["foo"]) == (3, "all", "FEATURE_EXTRACTION", 1)


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


def test_adapter_that_is_not_finite_is_warned_of(tmp_path):
    model = lc.add_adapter(nn.Sequential(nn.Linear(4, 4)), lc.LoraConfig(r=2, target_modules=["0"]))
    model[0].lora_b["default"].data[1, 1] = torch.nan
    lc.save_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match="holds NaN or infinity in 1 tensors, the first base_model.model.0.lora_B"):
        lc.load_adapter(nn.Sequential(nn.Linear(4, 4)), tmp_path)


@pytest.mark.parametrize("model", [None, "gpt2", {}], ids=str)
def test_what_is_no_module_is_refused(model, tmp_path):
    for verb in (lambda m: lc.add_adapter(m, lc.LoraConfig()), lambda m: lc.save_adapter(m, tmp_path)):
        with pytest.raises(lc.ConfigError, match=f"model is a {type(model).__name__}; want a torch.nn.Module"):
            verb(model)
