"""adapter_config.json: few fields, unknown fields, and fields that would change the forward."""

import json

import pytest
import torch
from checkpoints import (
    CONFIG,
    adapted,
    assert_refused,
    decoder,
    read,
    rewrite,
    saved,
)
from models import tokens

import lora_core as lc
from lora_core.adapt.configuration import REFUSED, config_from_peft, config_to_peft


@pytest.fixture
def folder(tmp_path):
    return saved(tmp_path)


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
