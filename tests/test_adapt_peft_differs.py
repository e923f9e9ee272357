"""What PEFT computes otherwise from the same file is told of when an adapter is saved, and when one is loaded."""

import warnings

import pytest
import torch
from torch import nn

import lora_core as lc


def adapt(model, **config):
    return lc.add_adapter(model, lc.LoraConfig(r=2, **config))


def test_layer_reached_by_two_names_is_told_of_when_saving_and_loading(tmp_path):
    def build():
        shared = nn.Linear(8, 8)
        return nn.ModuleDict({"first": shared, "second": shared})

    model = adapt(build(), target_modules=["first"])
    for verb, given in ((lc.save_adapter, model), (lc.load_adapter, build())):
        with pytest.warns(UserWarning, match="first is second too, one module: PEFT adapts it under its first name"):
            verb(given, tmp_path)


def test_convolution_that_pads_otherwise_is_told_of_when_saving(tmp_path):
    model = adapt(nn.ModuleDict({"c": nn.Conv1d(2, 2, 3, padding=1, padding_mode="reflect")}), target_modules=["c"])
    with pytest.warns(UserWarning, match="c pads by 'reflect': PEFT pads with zeros"):
        lc.save_adapter(model, tmp_path)


def test_convolution_dilated_along_one_side_is_told_of_when_saving(tmp_path):
    model = adapt(nn.ModuleDict({"c": nn.Conv2d(2, 2, 3, dilation=(1, 2))}), target_modules=["c"])
    with pytest.warns(UserWarning, match=r"c has a dilation of \(1, 2\): PEFT runs A without"):
        lc.save_adapter(model, tmp_path)


def test_an_embedding_with_a_largest_norm_is_told_of_when_saving(tmp_path):
    model = adapt(nn.ModuleDict({"e": nn.Embedding(10, 6, max_norm=1.0)}), target_modules=["e"])
    with pytest.warns(UserWarning, match="e has max_norm=1.0: PEFT changes A by it"):
        lc.save_adapter(model, tmp_path)


@pytest.mark.peer("transformers")
@pytest.mark.peer("peft")
def test_layers_that_peft_takes_for_experts_are_told_of_when_saving(tmp_path):
    import peft
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "mlp_only_layers": [0], "pad_token_id": 0}
    experts = {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}

    def base():
        torch.manual_seed(0)
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **experts)).eval()

    model, ids = base(), torch.arange(6)[None]
    with warnings.catch_warnings():
        # of the experts that the names mean, and leave out
        warnings.simplefilter("ignore")
        config = lc.LoraConfig(r=2, target_modules=["q_proj", "gate_proj", "up_proj"], init_lora_weights=False)
        lc.add_adapter(model, config)
    with pytest.warns(UserWarning, match="mlp.up_proj is no expert, and PEFT takes its name for one") as told:
        lc.save_adapter(model, tmp_path)
    assert len(told) == 2
    # and so it does
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    assert (other(input_ids=ids).logits - model(input_ids=ids).logits).abs().max() > 1e-3
