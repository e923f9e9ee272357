"""Saving and loading adapters: every kind of layer comes back, and what was trained stays as it was."""

import copy
import json
import shutil

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
    rewrite,
    rows,
    saved,
    scramble,
    shared,
    state,
    trained,
    wide,
)
from models import randomise, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lora_core as lc
from lora_core.adapt import files
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


class Picture(nn.Sequential):
    """Has no tokens, and says so as transformers' models of images and sound do."""

    def get_input_embeddings(self):
        raise NotImplementedError

    get_output_embeddings = get_input_embeddings


def test_checkpoint_of_a_model_without_tokens_loads(tmp_path):
    lc.save_adapter(adapted(Picture(nn.Linear(4, 4)), target_modules="all-linear"), tmp_path)
    assert list(adapter_layers(lc.load_adapter(Picture(nn.Linear(4, 4)), tmp_path))) == ["0"]


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
