"""Adapters in transformers' own models."""

import copy
import warnings

import pytest
import torch
from models import randomise, recompute_activations
from tolerance import assert_same_function

import lora_core as lc
from lora_core.adapt.walk import adapter_layers
from lora_core.layers.nf4_linear import NF4Linear

pytestmark = pytest.mark.peer("transformers")


def llama(**fields):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=61)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**shape, "num_key_value_heads": 2, **fields}))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=61, n_positions=16))


def falcon(bias=False):
    """Its linear layers are of a class of their own, which adds the bias in a step of its own."""
    from transformers import FalconConfig, FalconForCausalLM

    torch.manual_seed(0)
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=61)
    model = FalconForCausalLM(FalconConfig(**shape, bias=bias))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


MODELS = {"llama": llama, "gpt2": gpt2, "falcon": falcon}
TOKENS = torch.arange(12).view(2, 6) % 61


def adapt(model, **config):
    return lc.add_adapter(model, lc.LoraConfig(**{"r": 4, "target_modules": "all-linear", **config}))


def loss_of(model):
    return model(input_ids=TOKENS, labels=TOKENS).loss


@pytest.mark.parametrize("kind", MODELS)
def test_all_linear_takes_every_linear_layer_but_the_head(kind):
    from transformers.pytorch_utils import Conv1D

    model = MODELS[kind]()
    linear = {n for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D)) and n != "lm_head"}
    assert set(adapter_layers(adapt(model))) == linear


@pytest.mark.parametrize("kind", MODELS)
def test_adapted_models_start_unchanged_and_learn(kind):
    model = MODELS[kind]().eval()
    before = loss_of(model)
    adapt(model)
    assert torch.equal(loss_of(model), before)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert loss_of(model) < before


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_checkpointing_gives_the_adapters_the_gradients_without_it(kind, reentrant):
    plain = MODELS[kind]()
    other = copy.deepcopy(plain)
    # reentrant checkpointing also asks for a gradient at the embedding, so it is switched on before the adapters
    keywords = {} if reentrant is None else {"activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    recompute_activations(other, **keywords)
    grads = []
    for model in (plain, other):
        adapt(model)
        randomise(model)
        model.train()
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss_of(model).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if "lora_" in n})
    assert all(g is not None and g.any() for g in grads[1].values())
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


@pytest.mark.parametrize("kind", MODELS)
def test_quantised_transformers_models_run_and_train_their_adapters(kind):
    model = lc.quantize_model(MODELS[kind]())
    assert next(m for n, m in model.named_modules() if n == "lm_head").__class__ is torch.nn.Linear
    adapt(model)
    loss_of(model).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_b" in n)


@pytest.mark.parametrize("bias", [False, True])
def test_falcons_own_linear_layers_are_fused_merged_and_quantised(bias):
    from transformers.models.falcon.modeling_falcon import FalconLinear

    model = falcon(bias).eval()
    linear = {n for n, m in model.named_modules() if type(m) is FalconLinear}
    assert len(linear) == 8
    dense = copy.deepcopy(model)
    adapt(model.double())
    randomise(model, 0.1)
    want = model(TOKENS).logits
    assert set(lc.fuse(model).swapped) == linear
    assert_same_function(model(TOKENS).logits, want)
    merged = lc.merge_and_unload(model)
    assert {n for n, m in merged.named_modules() if type(m) is FalconLinear} == linear
    assert_same_function(merged(TOKENS).logits, want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lc.quantize_model(dense)
    assert {n for n, m in dense.named_modules() if type(m) is NF4Linear} == linear


def test_a_class_made_of_falcons_linear_layer_is_its_own():
    from transformers.models.falcon.modeling_falcon import FalconLinear

    class Doubled(FalconLinear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = torch.nn.Sequential(Doubled(8, 8), FalconLinear(8, 8))
    with pytest.warns(UserWarning, match="leaves 0 in full precision"):
        lc.quantize_model(model)
    assert [type(m) for m in model] == [Doubled, NF4Linear]


def test_merged_model_is_a_plain_transformers_model_again(tmp_path):
    from transformers import LlamaForCausalLM

    model = llama().eval()
    adapt(model)
    randomise(model, 0.1)
    lc.merge_and_unload(model)
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_generation_runs_with_an_adapter_and_without():
    model = llama().eval()
    base = model.generate(TOKENS, max_new_tokens=4, do_sample=False)
    adapt(model)
    assert torch.equal(model.generate(TOKENS, max_new_tokens=4, do_sample=False), base)
    randomise(model, 2.0)
    changed = model.generate(TOKENS, max_new_tokens=4, do_sample=False)
    assert changed.shape == base.shape
    with lc.disable_adapter(model):
        assert torch.equal(model.generate(TOKENS, max_new_tokens=4, do_sample=False), base)


def test_classifier_head_is_left_out_for_sequence_classification():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=61)
    model = adapt(LlamaForSequenceClassification(LlamaConfig(**shape)), task_type="SEQ_CLS")
    assert "score" not in adapter_layers(model) and len(adapter_layers(model)) == 7


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
    ],
    ids=["saved", "head", "both"],
)
@pytest.mark.filterwarnings("ignore:.*tied to", "ignore:.*one module")
def test_a_model_whose_tied_head_is_adapted_is_saved_by_transformers(tmp_path, config):
    """As a Trainer does at every checkpoint: the weight that two modules have goes by one of its names."""
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True))
    lc.add_adapter(model, lc.LoraConfig(r=2, **config))
    model.save_pretrained(tmp_path)
    saved, state = load_file(tmp_path / "model.safetensors"), model.state_dict()
    assert all(torch.equal(saved[name], state[name]) for name in saved)
    held = {state[name].data_ptr() for name in saved}
    assert state.keys() > saved.keys()
    assert all(state[name].data_ptr() in held for name in state.keys() - saved.keys())
