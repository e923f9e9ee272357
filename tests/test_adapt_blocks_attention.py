"""fuse(blocks=True) and what attends: by the operation where it is PyTorch's and causal, else as ever."""

import copy
import io
from types import SimpleNamespace

import pytest
import torch
import transformers
from small_transformers import (
    MARKS,
    OWN_SIZES,
    SIZES,
    TOKENS,
    adapted,
    assert_same,
    attentions,
    kinds,
    model_of,
    results,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

import lora_core as lc
from lora_core.cpu import compiled
from lora_core.layers import block_attention
from lora_core.layers.block_attention import FusedAttention
from lora_core.layers.fused import Fused
from lora_core.ops import causal_attention

pytestmark = MARKS


@pytest.mark.parametrize("family", OWN_SIZES)
def test_models_that_rotate_otherwise_or_not_at_all(family, monkeypatch):
    model = adapted(model_of(family))
    want = results(model)
    report = lc.fuse(model, blocks=True)
    assert len(kinds(model, FusedAttention)) == 2 and {*kinds(model, FusedAttention)} <= {*report.blocks}
    count = attentions(monkeypatch)
    assert_same(results(model), want)
    assert count() == 2


def test_weights_that_are_all_trained_get_their_gradients(monkeypatch):
    model = model_of()
    want = results(model)
    lc.fuse(model, blocks=True)
    count = attentions(monkeypatch)
    assert_same(results(model), want)
    assert count() == 2


def test_encoders_are_not_mentioned():
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**{**SIZES, "num_key_value_heads": None})).eval()
    report = lc.fuse(model, blocks=True)
    assert report.blocks == []
    assert set(report.skipped.values()) == {"neither adapted nor in 4 bits: there is nothing to fuse"}


def test_a_decoder_whose_bert_attends_to_earlier_tokens(monkeypatch):
    torch.manual_seed(0)
    config = transformers.BertConfig(**{**SIZES, "num_key_value_heads": None}, is_decoder=True)
    model = transformers.BertLMHeadModel(config).eval()
    want = model(TOKENS, use_cache=False).logits
    assert len(lc.fuse(model, blocks=True).blocks) == 2
    count = attentions(monkeypatch)
    torch.testing.assert_close(model(TOKENS, use_cache=False).logits, want)
    assert count() == 2


def padded():
    mask = torch.ones_like(TOKENS)
    mask[0, :4] = 0
    return {"attention_mask": mask}


GIVEN = {
    "padding": (padded, {}, 0),
    "a mask of ones": (lambda: {"attention_mask": torch.ones_like(TOKENS)}, {}, 2),
    "sequences packed one behind the other": (
        lambda: {"position_ids": torch.arange(12).remainder(6).expand(2, 12)},
        {},
        0,
    ),
    "every position": (lambda: {"position_ids": torch.arange(12).expand(2, 12)}, {}, 2),
    "a window smaller than the sequence": (dict, {"family": "Mistral", "sliding_window": 5}, 0),
    "a window larger than the sequence": (dict, {"family": "Mistral", "sliding_window": 50}, 2),
    "eager": (dict, {"attn_implementation": "eager"}, 0),
    "attention that is asked for": (lambda: {"output_attentions": True}, {"attn_implementation": "eager"}, 0),
    "to all tokens": (lambda: {"is_causal": False}, {}, 0),
}


@pytest.mark.parametrize("what", GIVEN)
def test_what_masks_and_settings_leave(what, monkeypatch):
    given, fields, calls = GIVEN[what]
    model = adapted(model_of(**fields))
    want = results(model, **given())
    lc.fuse(model, blocks=True)
    count = attentions(monkeypatch)
    assert_same(results(model, **given()), want)
    assert count() == calls


def test_attentions_are_asked_for_at_every_call(monkeypatch):
    model = adapted(model_of())
    lc.fuse(model, blocks=True)
    count = attentions(monkeypatch)
    want = results(model)
    assert count() == 2
    # PyTorch's has none to return, of which transformers' function warns
    assert not model(TOKENS, use_cache=False, output_attentions=True).attentions
    model.set_attn_implementation("eager")
    made = model(TOKENS, use_cache=False, output_attentions=True)
    assert [a.shape for a in made.attentions] == [(2, 4, 12, 12)] * 2 and count() == 0
    assert_same(results(model), want)
    model.set_attn_implementation("sdpa")
    assert_same(results(model), want)
    assert count() == 2


def test_a_function_of_ones_own_is_called(monkeypatch):
    seen = []

    def mine(module, query, *rest, **options):
        seen.append(query.shape)
        return sdpa_attention_forward(module, query, *rest, **options)

    model = adapted(model_of())
    lc.fuse(model, blocks=True)
    want = results(model)
    count = attentions(monkeypatch)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "mine", mine)
    model.set_attn_implementation("mine")
    assert_same(results(model), want)
    assert seen == [(2, 4, 12, 8)] * 2 and count() == 0
    # also under the name of PyTorch's
    model.set_attn_implementation("sdpa")
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", mine)
    assert_same(results(model), want)
    assert len(seen) == 4 and count() == 0


def test_a_name_that_nothing_is_registered_by_is_refused_in_the_registrys_own_words():
    model = model_of()
    lc.fuse(model, blocks=True)
    model.config._attn_implementation_internal = "nothing of this name"
    with pytest.raises(KeyError, match="nothing of this name"):
        model(TOKENS)


def test_dropout_of_attention_is_the_models_own(monkeypatch):
    model = adapted(model_of(attention_dropout=0.5)).train()

    def seeded():
        torch.manual_seed(5)
        return results(model)

    want = seeded()
    lc.fuse(model, blocks=True)
    count = attentions(monkeypatch)
    assert_same(seeded(), want)
    assert count() == 0
    model.eval()
    results(model)
    assert count() == 2


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_prompt_is_attended_to_by_the_operation_and_a_cache_by_the_model(kind, monkeypatch):
    model = adapted(model_of())
    given = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": kind, "disable_compile": True}
    want = model.generate(TOKENS, **given)
    lc.fuse(model, blocks=True)
    count = attentions(monkeypatch)
    assert torch.equal(model.generate(TOKENS, **given), want)
    # a static cache is longer than the prompt
    assert count() == (2 if kind == "dynamic" else 0)


def test_a_prompt_in_two_parts(monkeypatch):
    model = adapted(model_of())
    want = model(TOKENS, use_cache=False).logits
    lc.fuse(model, blocks=True)
    count = attentions(monkeypatch)
    first = model(TOKENS[:, :7], use_cache=True)
    assert count() == 2
    second = model(TOKENS[:, 7:], past_key_values=first.past_key_values)
    assert count() == 0
    torch.testing.assert_close(torch.cat((first.logits, second.logits), 1), want)


def test_one_token_is_attended_to_by_the_model(monkeypatch):
    model = adapted(model_of())
    lc.fuse(model, blocks=True)
    count = attentions(monkeypatch)
    model(TOKENS[:, :1], use_cache=False)
    assert count() == 0
    # of which nothing is made that would be of use to more of them
    monkeypatch.setattr(block_attention, "_with_others", None)
    model(TOKENS[:, :1], use_cache=False)
    with pytest.raises(TypeError):
        model(TOKENS[:, :2], use_cache=False)


def test_compiled_loops_attend_where_heads_are_as_wide_as_their_vectors(monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setattr(compiled, "WORTHWHILE", 0)
    for name in ("LONG", "WIDE", "BUSY"):
        monkeypatch.setattr(f"lora_core.cpu.causal_attention.{name}", 0)
    loops = compiled.load("causal_attention")
    sizes = {"hidden_size": 4 * loops.LANES, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = adapted(model_of(**sizes)).train()
    want = results(model)
    monkeypatch.setattr(block_attention, "is_better", causal_attention.is_better)
    seen = []
    for way in ("forward", "backward"):
        run = getattr(loops, way)
        monkeypatch.setattr(loops, way, lambda *args, way=way, run=run: seen.append(way) or run(*args))
    lc.fuse(model, blocks=True)
    assert_same(results(model), want)
    assert seen == ["forward", "forward", "backward", "backward"]


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_attention_is_recomputed_under_checkpointing(reentrant, family, monkeypatch):
    model = adapted(model_of(family)).train()
    want = results(model)
    lc.fuse(model, blocks=True)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    count = attentions(monkeypatch)
    assert_same(results(model), want)
    assert count() == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_the_models_own(dtype, monkeypatch):
    model = adapted(model_of("GPT2")).to(dtype)
    want = results(model)
    lc.fuse(model, blocks=True)
    count = attentions(monkeypatch)
    assert_same(results(model), want, 0, 0)
    assert count() == 0


def test_copies_pickles_and_unfused_models(monkeypatch):
    model = adapted(model_of("GPT2"))
    want = results(model)
    classes = {name: type(m) for name, m in model.named_modules()}
    lc.fuse(model, blocks=True)
    kept = io.BytesIO()
    torch.save(model, kept)
    kept.seek(0)
    count = attentions(monkeypatch)
    for other in (copy.deepcopy(model), torch.load(kept, weights_only=False)):
        assert kinds(other, FusedAttention) == kinds(model, FusedAttention)
        assert_same(results(other), want)
        assert count() == 2
        assert not kinds(lc.unfuse(other), Fused)
    bound = model.transformer.h[0].attn.forward
    lc.unfuse(model)
    assert {name: type(m) for name, m in model.named_modules()} == classes
    # what was bound while it was fused runs its own forward
    assert bound(torch.ones(1, 3, 32))[0].shape == (1, 3, 32)
    assert all(map(torch.equal, results(model), want))
    assert count() == 0


def test_a_forward_that_takes_the_place_of_the_one_that_was_read_runs(monkeypatch):
    model = model_of()
    lc.fuse(model, blocks=True)
    count, own, seen = attentions(monkeypatch), modeling_llama.LlamaAttention.forward, []

    def forward(self, *args, **kwargs):
        # what stands for the registry in the other forward is no mapping
        seen.append(ALL_ATTENTION_FUNCTIONS["sdpa"])
        return own(self, *args, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    model(TOKENS)
    assert seen == [sdpa_attention_forward] * 2 and count() == 0


def test_a_registry_that_takes_the_place_of_another_is_asked(monkeypatch):
    model = model_of()
    lc.fuse(model, blocks=True)
    count, seen = attentions(monkeypatch), []

    def asked(*given):
        seen.append(given)
        return sdpa_attention_forward

    monkeypatch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", SimpleNamespace(get_interface=asked))
    model(TOKENS, use_cache=False)
    assert seen == [("sdpa", modeling_llama.eager_attention_forward)] * 2 and count() == 2


def test_other_models_of_the_process_attend_as_before(monkeypatch):
    fused, other = model_of(), model_of()
    lc.fuse(fused, blocks=True)
    count = attentions(monkeypatch)
    other(TOKENS, use_cache=False)
    assert count() == 0 and modeling_llama.ALL_ATTENTION_FUNCTIONS is ALL_ATTENTION_FUNCTIONS


def test_a_compiler_sees_the_attention_as_it_was(monkeypatch):
    model = model_of("GPT2")
    layer, x = model.transformer.h[0].attn, torch.randn(2, 5, 32)
    want = layer(x)[0]
    lc.fuse(model, blocks=True)
    count = attentions(monkeypatch)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], want)
    assert count() == 0
    torch.testing.assert_close(layer(x)[0], want)
    assert count() == 1


def test_tracers_and_transforms_see_the_attention_as_it_was(monkeypatch):
    layer, x = model_of("GPT2").transformer.h[0].attn, torch.randn(2, 5, 32)
    lc.fuse(layer, blocks=True)
    count = attentions(monkeypatch)
    # the check of what was traced calls it without a tracer, too
    graph = str(torch.jit.trace(lambda x: layer.requires_grad_(False)(x)[0], x, check_trace=False).inlined_graph)
    assert count() == 0
    assert "aten::scaled_dot_product_attention" in graph
    torch.func.grad(lambda x: layer(x)[0].sum())(x)
    assert count() == 0
