"""Model shapes: counts as published, and as transformers builds the models."""

import json

import pytest
from models import transformers_config

from lora_core.errors import ConfigError
from lora_core.plan.catalogue import SHAPES, find_shape
from lora_core.plan.config_file import MODEL_TYPES, read_shape
from lora_core.plan.shape import ModelShape

# parameters of the released weights; GPT-3's count is only published rounded
PUBLISHED = {
    "GPT-2": 124_439_808,
    "LLaMA-65B": 65_285_660_672,
    "Llama-2-7B": 6_738_415_616,
    "Llama-2-13B": 13_015_864_320,
    "Llama-2-70B": 68_976_648_192,
    "Llama-3-8B": 8_030_261_248,
    "Llama-3-70B": 70_553_706_496,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Mistral-7B": 7_241_732_096,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-7B": 7_615_616_512,
}


def on_meta(config):
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_shape_has_the_published_count(name):
    assert find_shape(name).parameters == PUBLISHED[name]


def test_gpt3_has_175_billion_parameters():
    assert round(find_shape("gpt-3").parameters / 1e9) == 175


@pytest.mark.peer("transformers")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_shape_counts_what_transformers_builds(shape):
    model = on_meta(transformers_config(shape))
    assert sum(p.numel() for p in model.parameters()) == shape.parameters
    if not shape.positions:
        weights = {n.rpartition("layers.0.")[2]: p for n, p in model.named_parameters() if "layers.0." in n}
        for layer in shape.linears:
            found = next(p for n, p in weights.items() if n.endswith(f"{layer.name}.weight"))
            assert tuple(found.shape) == (layer.rows, layer.columns)


@pytest.mark.peer("transformers")
@pytest.mark.parametrize("name", ["GPT-2", "Llama-3-8B", "Mistral-7B", "Qwen2.5-0.5B"])
def test_config_file_gives_the_shape(name, tmp_path):
    from dataclasses import replace

    shape = find_shape(name)
    transformers_config(shape).save_pretrained(tmp_path)
    read = read_shape(tmp_path)
    assert replace(read, name=name, source=shape.source, head_size=None) == shape
    assert read_shape(tmp_path / "config.json").parameters == shape.parameters


@pytest.mark.peer("transformers")
def test_config_file_reads_a_head_size_of_its_own(tmp_path):
    import transformers

    config = transformers.MistralConfig(
        num_hidden_layers=2, hidden_size=48, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
        head_dim=20, vocab_size=64,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    assert read_shape(tmp_path).parameters == sum(p.numel() for p in on_meta(config).parameters())


def tiny_config(kind, **more):
    import transformers

    gpt2 = {"n_layer": 2, "n_embd": 48, "n_head": 4, "n_positions": 32, "vocab_size": 64}
    rotary = {
        **({"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0} if kind == "phi3" else {}),
        "num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64,
    }  # fmt: skip
    return transformers.AutoConfig.for_model(kind, **(gpt2 if kind == "gpt2" else rotary), **more)


@pytest.mark.peer("transformers")
@pytest.mark.parametrize(
    ("kind", "more"),
    [(kind, {"tie_word_embeddings": tied}) for kind in MODEL_TYPES for tied in (False, True)]
    + [
        ("qwen3", {"attention_bias": True}),
        ("qwen3", {"head_dim": 20}),
        ("llama", {"attention_bias": True}),
        ("gpt2", {"n_inner": 80}),
        ("mistral", {"head_dim": 20}),
    ],
)
def test_config_file_counts_what_transformers_builds(kind, more, tmp_path):
    config = tiny_config(kind, **more)
    config.save_pretrained(tmp_path)
    assert read_shape(tmp_path).parameters == sum(p.numel() for p in on_meta(config).parameters())


@pytest.mark.peer("transformers")
def test_config_file_of_a_model_with_other_parts_gives_its_text_model(tmp_path):
    import transformers

    text = tiny_config("llama")
    transformers.LlavaConfig(text_config=text).save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    assert shape.parameters == sum(p.numel() for p in on_meta(text).parameters())
    assert shape.source == f"text_config of {tmp_path / 'config.json'}"


def test_gpt2_that_says_nothing_of_its_head_shares_the_table(tmp_path):
    """As the released file: transformers' default for it."""
    sizes = {"n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
    shape = read_shape(tmp_path)
    assert shape.tied and shape.parameters == PUBLISHED["GPT-2"]


def test_gpt2_with_a_head_of_its_own_has_one_table_more(tmp_path):
    sizes = {"n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "tie_word_embeddings": False, **sizes}))
    assert read_shape(tmp_path).parameters == 163_037_184


def test_config_file_may_start_with_a_byte_order_mark(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8-sig")
    assert read_shape(tmp_path).hidden == 8


LLAMA = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2,
    "vocab_size": 4,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 8, "n_head": 2, "n_positions": 4, "vocab_size": 4}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**LLAMA, "head_dim": 0}, "head_size of .* is 0; want a whole number of at least 1"),
        ({**LLAMA, "head_dim": 2.5}, "head_size of .* is 2.5"),
        ({**LLAMA, "num_key_value_heads": 0}, "kv_heads of .* is 0"),
        ({**LLAMA, "tie_word_embeddings": "false"}, "tie_word_embeddings of .* is 'false'; want true or false"),
        ({**LLAMA, "attention_bias": 1}, "attention_bias of .* is 1; want true or false"),
        ({**LLAMA, "hidden_size": 10**400}, "hidden of .* is 10000.*; want a whole number of at most"),
        ({**LLAMA, "hidden_size": {"a": "\ud800"}}, "hidden of .* is {'a': .*}; want a whole number"),
        ({**LLAMA, "model_type": "qwen2", "attention_bias": True}, "attention_bias in a llama or qwen3 alone"),
        ({**GPT2, "n_embd": None}, "hidden of .* is None"),
        ({**GPT2, "n_inner": 0}, "intermediate of .* is 0"),
        ({**GPT2, "n_positions": -1}, "positions of .* is -1; want a whole number of at least 0"),
        ({**GPT2, "n_positions": None}, "positions of .* is None"),
        ({**GPT2, "add_cross_attention": True}, "add_cross_attention, whose layers are not counted"),
        ({"model_type": "llava", "text_config": {"model_type": "llama"}}, "text_config of .* does not state"),
        ({"model_type": "llava", "text_config": {"model_type": "gemma"}}, "model_type of .* is 'llava'"),
    ],
)
def test_config_file_with_a_value_that_cannot_be_says_which(settings, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=message):
        read_shape(tmp_path)


def test_config_file_nested_too_deeply_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="nested too deeply"):
        read_shape(tmp_path)


def test_config_file_without_permission_is_refused(tmp_path, unreadable):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    unreadable(tmp_path)
    with pytest.raises(ConfigError, match="permission denied"):
        read_shape(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "holds a list"),
        ('{"model_type": "mamba"}', "is .mamba.*, qwen3, phi3, gpt2; for an estimate take the known model"),
        ("{}", "model_type of .* is None"),
        ('{"model_type": "llama", "hidden_size": 8}', "does not state 'num_hidden_layers'"),
        ('{"model_type": "llama", "mlp_bias": true}', "mlp_bias"),
    ],
)
def test_config_file_that_cannot_be_used_says_why(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_shape(tmp_path)


def test_config_file_with_a_size_that_is_no_size(tmp_path):
    sizes = {"num_hidden_layers": 2, "hidden_size": "8", "intermediate_size": 8, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 4, **sizes}))
    with pytest.raises(ConfigError, match="hidden of .* is '8'"):
        read_shape(tmp_path)


def test_missing_config_file_says_where_it_looked(tmp_path):
    with pytest.raises(ConfigError, match="config.json cannot be read"):
        read_shape(tmp_path)


def test_shape_is_found_by_its_repository():
    assert find_shape("meta-llama/llama-2-7b-hf") is find_shape("Llama-2-7B")
    assert find_shape("huggyllama/llama-65b") is find_shape("LLaMA-65B")


def test_unknown_model_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'Llama-2-7B'"):
        find_shape("lama2-7b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers of 'x' is 0"),
        ({"hidden": True}, "hidden of 'x' is True"),
        ({"kv_heads": 3}, "kv_heads 3; want a divisor of 4"),
        ({"hidden": 10}, "does not divide by 4 heads; give head_size"),
    ],
)
def test_shape_that_cannot_be_is_refused(change, message):
    sizes = {"layers": 1, "hidden": 8, "intermediate": 8, "heads": 4, "kv_heads": 2, "vocabulary": 5, **change}
    with pytest.raises(ConfigError, match=message):
        ModelShape(name="x", **sizes)


def test_targets_by_name_by_group_and_unknown():
    shape = find_shape("Llama-3-8B")
    assert [t.name for t in shape.targets("attention")] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert shape.targets("all-linear") == shape.linears
    assert [t.name for t in shape.targets(["v_proj", "q_proj"])] == ["q_proj", "v_proj"]
    with pytest.raises(ConfigError, match="no linear layer 'q_pro'.*did you mean 'q_proj'"):
        shape.targets(["q_pro"])
    with pytest.raises(ConfigError, match="did you mean 'all-linear'"):
        shape.targets(["all_linear"])
    with pytest.raises(ConfigError, match="did you mean 'attention'.*each alone"):
        shape.targets(["ATTENTION"])
    with pytest.raises(ConfigError, match="no target module was given"):
        shape.targets([])
