"""fuse(blocks=True): norms, gates and attentions between a model's layers, the same results, the same objects."""

import copy
import io

import peft
import pytest
import torch
from models import randomise
from small_transformers import (
    FAMILIES,
    MARKS,
    TOKENS,
    adapted,
    assert_same,
    calls_of,
    distance,
    kinds,
    model_of,
    results,
)
from transformers.models.llama import modeling_llama

import lora_core as lc
from lora_core.layers.block_attention import FusedRotatingAttention
from lora_core.layers.blocks import BlockPart, FusedGatedMLP, FusedRMSNorm
from lora_core.layers.fused import Fused

pytestmark = MARKS


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_results_by_fewer_operations(family, monkeypatch):
    model = adapted(model_of(family))
    want = results(model)
    report = lc.fuse(model, blocks=True)
    # of two layers, with two norms each and the last one; Qwen3 has one for queries and one for keys besides
    norms = 5 + 4 * (family == "Qwen3")
    assert len(kinds(model, FusedRMSNorm)) == norms
    assert len(kinds(model, FusedGatedMLP)) == len(kinds(model, FusedRotatingAttention)) == 2
    assert report.blocks == kinds(model, BlockPart)
    assert len(report.shared) == 4
    assert f"{norms + 4} norms, gates and attentions" in str(report)
    seen = calls_of(monkeypatch)
    assert_same(results(model), want)
    assert {name: seen.count(name) for name in seen} == {
        "rms_norm": norms,
        "swiglu": 2,
        "rotary": 4,
        "causal_attention": 2,
    }


def test_without_being_asked_for_nothing_between_the_layers_changes():
    model = adapted(model_of())
    report = lc.fuse(model)
    assert report.blocks == [] and not kinds(model, BlockPart) and "norms" not in str(report)


def test_keeps_objects_and_names_and_unfuse_gives_classes_back():
    model = adapted(model_of())
    want = results(model)
    modules, state = dict(model.named_modules()), model.state_dict()
    classes = {name: type(m) for name, m in modules.items()}
    lc.fuse(model, blocks=True)
    assert dict(model.named_modules()) == modules and list(model.state_dict()) == list(state)
    assert all(isinstance(m, classes[name]) for name, m in modules.items())
    again = lc.fuse(model, blocks=True)
    assert again.blocks == [] and {again.skipped[n] for n in kinds(model, BlockPart)} == {"it is fused already"}
    bound = model.model.norm.forward
    attention = model.model.layers[0].self_attn.forward
    lc.unfuse(model)
    assert {name: type(m) for name, m in model.named_modules()} == classes
    # what was bound while they were fused runs their own forwards
    assert bound(torch.ones(1, 32)).shape == (1, 32)
    assert attention.__self__ is model.model.layers[0].self_attn
    got = results(model)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_layers_that_are_adapted_later_share_what_they_read():
    model = model_of()
    lc.fuse(model, blocks=True)
    adapted(model)
    want = results(model)
    report = lc.fuse(model)
    assert len(report.shared) == 4 and len(report.swapped) == 14
    assert_same(results(model), want)


def test_copies_and_pickles_are_fused_and_on_their_own():
    model = adapted(model_of())
    lc.fuse(model, blocks=True)
    want = results(model)
    kept = io.BytesIO()
    torch.save(model, kept)
    kept.seek(0)
    for other in (copy.deepcopy(model), torch.load(kept, weights_only=False)):
        assert kinds(other, BlockPart) == kinds(model, BlockPart)
        with torch.no_grad():
            other.model.norm.weight.zero_()
        assert not results(other)[0].any()
        assert_same(results(model), want, 0, 0)
        assert not kinds(lc.unfuse(other), Fused)
    assert kinds(model, BlockPart)


def test_bfloat16_is_rounded_less_often():
    """On average over models: by chance one may come out further from float64."""
    before = after = 0.0
    for seed in range(6):
        model = adapted(model_of(seed=seed)).bfloat16()
        truth = results(copy.deepcopy(model).double())
        before += distance(results(model), truth)
        lc.fuse(model, blocks=True)
        made = results(model)
        assert {m.dtype for m in made if m.dim()} == {torch.bfloat16}
        after += distance(made, truth)
    assert 0 < after <= 1.1 * before


def test_float64_stays_float64(monkeypatch):
    model = adapted(model_of()).double()
    want = results(model)
    lc.fuse(model, blocks=True)
    seen = calls_of(monkeypatch)
    # transformers' own norm is float32 in any case
    assert_same(results(model), want, 1e-4, 1e-6)
    assert set(seen) == {"rms_norm", "swiglu", "rotary"}


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(reentrant):
    model = adapted(model_of()).train()
    want = results(model)
    lc.fuse(model, blocks=True)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(results(model), want)


def test_norms_that_are_trained_get_their_gradients():
    model = model_of()
    want = results(model)
    lc.fuse(model, blocks=True)
    got = results(model)
    assert len(got) == 2 + len(list(model.parameters()))
    assert_same(got, want)


def test_generates_the_same_tokens_with_a_cache():
    model = adapted(model_of())
    given = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "max_new_tokens": 8, "do_sample": False}
    want = model.generate(**given)
    lc.fuse(model, blocks=True)
    assert torch.equal(model.generate(**given), want)


def test_peft_models_and_its_verbs():
    config = peft.LoraConfig(r=4, target_modules="all-linear", modules_to_save=["norm"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model_of(), config)
    randomise(model)
    want = results(model)
    report = lc.fuse(model, blocks=True)
    # each norm that is trained, and its original beside it
    assert len([n for n in report.blocks if "norm" in n]) == 10
    assert_same(results(model), want)
    with model.disable_adapter():
        assert model(input_ids=TOKENS).logits.isfinite().all()
    merged = model.merge_and_unload()
    assert kinds(merged, FusedGatedMLP)
    torch.testing.assert_close(merged(input_ids=TOKENS).logits, want[0], rtol=1e-4, atol=1e-5)


def test_hooks_of_every_module_are_called_with_what_it_gets():
    model = adapted(model_of())
    lc.fuse(model, blocks=True)
    seen = []
    names = ["mlp", "mlp.gate_proj", "mlp.down_proj", "self_attn", "self_attn.q_proj", "input_layernorm"]
    for name in names:
        layer = model.model.layers[0].get_submodule(name)
        layer.register_forward_hook(lambda m, given, made, name=name: seen.append(name))
    results(model)
    assert sorted(seen) == sorted(names)


def test_other_models_of_the_process_rotate_and_attend_as_before(monkeypatch):
    fused, other = adapted(model_of()), adapted(model_of())
    lc.fuse(fused, blocks=True)
    seen = calls_of(monkeypatch)
    results(other)
    assert seen == [] and modeling_llama.apply_rotary_pos_emb.__module__ == modeling_llama.__name__


def test_what_a_module_calls_may_be_replaced_later(monkeypatch):
    model = model_of(attn_implementation="eager")
    lc.fuse(model, blocks=True)
    results(model)
    seen, attend, rotate = [], modeling_llama.eager_attention_forward, modeling_llama.apply_rotary_pos_emb
    with monkeypatch.context() as patch:
        patch.setattr(
            modeling_llama, "eager_attention_forward", lambda *a, **k: seen.append("attention") or attend(*a, **k)
        )
        results(model)
        assert seen == ["attention"] * 2
        patch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda *a: seen.append("rotation") or rotate(*a))
        called = calls_of(patch)
        results(model)
        assert seen.count("rotation") == 2 and "rotary" not in called
    called = calls_of(monkeypatch)
    results(model)
    assert called.count("rotary") == 4
