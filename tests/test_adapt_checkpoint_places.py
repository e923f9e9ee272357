"""Where nothing can be saved or loaded: places that are no folder, models and numbers that do not allow it."""

import shutil

import pytest
import torch
from checkpoints import (
    CONFIG,
    WEIGHTS,
    adapted,
    assert_same_state,
    decoder,
    rewrite,
    state,
)
from safetensors.torch import load_file, save_file
from torch import nn

import lora_core as lc
from lora_core.adapt import files


def test_checkpoint_into_a_merged_model_is_refused(tmp_path):
    model = adapted(decoder(), target_modules="all-linear")
    lc.save_adapter(model, tmp_path)
    lc.merge_adapter(model)
    with pytest.raises(lc.AdapterError, match="unmerge_adapter"):
        lc.load_adapter(model, tmp_path, "second")


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


@pytest.mark.parametrize("folder", [None, 5, "", "a\0b", "a\ud800b"], ids=repr)
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
    with pytest.raises(lc.CheckpointError, match=f"{CONFIG} is no file"):
        lc.load_adapter(nn.Sequential(nn.Linear(4, 4)), tmp_path / "a")
    with pytest.raises(lc.CheckpointError, match="cannot save an adapter in .*what was there is whole"):
        lc.save_adapter(model, tmp_path / "a")
    assert not list((tmp_path / "a").glob(".*"))


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
