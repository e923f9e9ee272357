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
    wide,
)
from models import tokens

import lora_core as lc
from lora_core.adapt.configuration import REFUSED, config_from_peft, config_to_peft, differences
from lora_core.adapt.walk import adapter_layers


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


@pytest.mark.parametrize(
    "left",
    [
        {},
        {"bias": "none"},
        {"init_lora_weights": None},
        {"init_lora_weights": "EVA", "peft_type": "lora", "target_modules": ["v_proj", "q_proj"]},
        {"use_rslora": None, "rank_pattern": None, "modules_to_save": [], "use_dora": False},
    ],
)
def test_configuration_that_means_the_same_goes_with_the_weights_saved(folder, left):
    wanted = lc.load_adapter(decoder(), folder)(tokens())
    few = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
    (folder / CONFIG).write_text(json.dumps(few | left))
    assert torch.equal(lc.load_adapter(decoder(), folder)(tokens()), wanted)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"layers_to_transform": 0}, {}, False),
        ({"layers_to_transform": 0}, {"layers_to_transform": [0]}, True),
        ({"layers_to_transform": [0, 1]}, {"layers_to_transform": [1, 0]}, True),
        ({"layers_to_transform": [0, 1]}, {"layers_to_transform": 0}, False),
        ({"layers_pattern": "h"}, {"layers_pattern": ["h"]}, True),
        # an expression for whole names, and the end of one
        ({"target_modules": "q_proj"}, {"target_modules": ["q_proj"]}, False),
    ],
)
def test_configurations_are_compared_by_what_they_mean(one, other, same):
    assert (not differences(one, other)) is same and (not differences(other, one)) is same


@pytest.mark.parametrize("other", [{"bias": "all"}, {"init_lora_weights": False}, {"use_rslora": True}, {"r": None}])
def test_configuration_that_means_another_does_not(folder, other):
    few = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
    (folder / CONFIG).write_text(json.dumps(few | other))
    assert_refused(folder, "not of one generation", f"{next(iter(other))} is")


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


def test_configuration_changed_by_hand_to_what_is_not_implemented_is_refused_as_that(folder):
    """The copy inside the weights says otherwise, but to put the file back is not what was wanted."""
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**values, "lora_bias": True}))
    assert_refused(folder, "sets lora_bias to True", "not implemented", error=lc.ConfigError)


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


def test_configuration_may_start_with_a_byte_order_mark(folder):
    wanted = lc.load_adapter(decoder(), folder)(tokens())
    (folder / CONFIG).write_text((folder / CONFIG).read_text(), encoding="utf-8-sig")
    assert torch.equal(lc.load_adapter(decoder(), folder)(tokens()), wanted)


# what no adapter has, and any file may


@pytest.mark.parametrize("rank", [10**9, 2**40, 2**62, 10**400])
@pytest.mark.parametrize("field", ["r", "rank_pattern"])
def test_configuration_of_a_rank_beyond_any_weight_is_refused(folder, field, rank):
    rewrite(folder, config={field: rank if field == "r" else {"q_proj": rank}})
    assert_refused(folder, "rank of", "want at most 65,536", error=lc.ConfigError)


@pytest.mark.parametrize("alpha", [10**400, -(10**400), float("nan")])
@pytest.mark.parametrize("field", ["lora_alpha", "alpha_pattern"])
def test_configuration_of_an_alpha_beyond_any_float_is_refused(folder, field, alpha):
    rewrite(folder, config={field: alpha if field == "lora_alpha" else {"q_proj": alpha}})
    assert_refused(folder, "alpha of", "want a finite number", error=lc.ConfigError)


@pytest.mark.parametrize("iterations", [101, 999_999_999, 10**30])
def test_configuration_of_a_start_that_would_not_end_is_refused(folder, iterations):
    rewrite(folder, config={"init_lora_weights": f"pissa_niter_{iterations}"})
    assert_refused(folder, f"pissa_niter_{iterations}", "N of at most 100", error=lc.ConfigError)


@pytest.mark.parametrize(
    "fields",
    [
        {"rank_pattern": {"(?i)q_proj": 4}},
        {"alpha_pattern": {"(?i)q_proj": 4}},
        {"layers_pattern": "(?i)layers", "layers_to_transform": [0]},
        {"modules_to_save": ["(?i)norm"]},
    ],
    ids=str,
)
def test_configuration_of_an_expression_that_cannot_stand_inside_another_is_refused(folder, fields):
    rewrite(folder, config=fields)
    assert_refused(folder, "no part of a regular expression", "(?i:...)", error=lc.ConfigError)


@pytest.mark.parametrize("expression", ["a{99999999999999999999}", "(" * 3000 + ")" * 3000])
def test_configuration_of_an_expression_beyond_the_compiler_is_refused(folder, expression):
    rewrite(folder, config={"target_modules": expression})
    assert_refused(folder, "no regular expression", error=lc.ConfigError)


def test_configuration_of_a_whole_expression_may_have_flags(folder):
    wanted = lc.load_adapter(decoder(), folder)(tokens())
    rewrite(folder, config={"target_modules": r"(?i).*\.[QV]_PROJ", "rank_pattern": {"(?i:Q_PROJ)": 4}, "r": 4})
    assert torch.equal(lc.load_adapter(decoder(), folder)(tokens()), wanted)


def test_configuration_of_a_layers_pattern_may_have_groups():
    model = adapted(decoder(), target_modules=["q_proj"], layers_pattern="(layers|blocks)", layers_to_transform=[1])
    assert list(adapter_layers(model)) == ["layers.1.attn.q_proj"]


@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
def test_configuration_of_an_empty_name_is_refused(folder, field):
    rewrite(folder, config={field: ["q_proj", ""]})
    assert_refused(folder, f"{field} is ['q_proj', '']", "empty name", error=lc.ConfigError)


# patterns: the first that matches counts, and PEFT sorts them

PATTERNS = [
    {"v_proj": 2, "layers.1.attn.v_proj": 6},
    {"layers.1.attn.v_proj": 6, "v_proj": 2},
    {"q_proj": 3, r"layers\.[12]\..*": 5, r".*\.v_proj": 7},
    {"v_proj": 2, r".*\.1\..*": 2, "attn.v_proj": 5, "q_proj": 1},
    {"layers.0.attn.q_proj": 7, "v_proj": 3},
]


FIELDS = ("rank_pattern", "alpha_pattern")


def with_patterns(patterns, make=decoder):
    alphas = {pattern: 100 * value for pattern, value in patterns.items()}
    return adapted(make(), target_modules=["q_proj", "v_proj"], rank_pattern=patterns, alpha_pattern=alphas)


def sizes(model):
    """Rank and scaling of every adapted layer."""
    layers = adapter_layers(model)
    return {name: (layer.adapters["default"].rank, layer.adapters["default"].scaling) for name, layer in layers.items()}


@pytest.mark.parametrize("patterns", PATTERNS, ids=str)
def test_configuration_patterns_are_written_so_that_any_order_means_the_same(tmp_path, patterns):
    model = with_patterns(patterns)
    lc.save_adapter(model, tmp_path)
    assert sizes(lc.load_adapter(decoder(), tmp_path)) == sizes(model)
    written = read(tmp_path)
    for order in (sorted, reversed, lambda items: sorted(items, reverse=True)):
        rewrite(tmp_path, config={field: dict(order(written[field].items())) for field in FIELDS})
        loaded = lc.load_adapter(decoder(), tmp_path)
        assert sizes(loaded) == sizes(model)
        assert torch.equal(loaded(tokens()), model(tokens()))


def test_configuration_patterns_that_agree_are_written_as_they_are(tmp_path):
    lc.save_adapter(with_patterns(PATTERNS[-1]), tmp_path)
    assert list(read(tmp_path)["rank_pattern"].items()) == list(PATTERNS[-1].items())


def test_configuration_pattern_behind_a_wider_one_is_not_written(tmp_path):
    lc.save_adapter(with_patterns(PATTERNS[0]), tmp_path)
    assert read(tmp_path)["rank_pattern"] == {"v_proj": 2}


@pytest.mark.peer("peft")
@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
@pytest.mark.parametrize("patterns", PATTERNS, ids=str)
def test_configuration_patterns_come_back_from_peft(tmp_path, patterns):
    import peft

    model = with_patterns(patterns, wide)
    lc.save_adapter(model, tmp_path / "ours")
    peers = peft.PeftModel.from_pretrained(wide(), tmp_path / "ours").eval()
    layers = {n: m for n, m in peers.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert {n: (m.r["default"], m.scaling["default"]) for n, m in layers.items()} == sizes(model)
    torch.testing.assert_close(peers(tokens()), model(tokens()))
    peers.save_pretrained(tmp_path / "peft")
    again = lc.load_adapter(wide(), tmp_path / "peft")
    assert sizes(again) == sizes(model)
    assert torch.equal(again(tokens()), model(tokens()))
