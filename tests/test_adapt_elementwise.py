"""fuse(blocks=True): norms, gates and rotations between a model's layers, the same results, the same objects."""

import copy
import functools
import io
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from fusible import MARKS
from models import randomise
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, rotate_half

import lora_core as lc
from lora_core.adapt import blocks
from lora_core.layers import blocks as layers
from lora_core.layers.blocks import BlockPart, FusedGatedMLP, FusedRMSNorm, FusedRotation
from lora_core.layers.fused import Fused

pytestmark = MARKS


@pytest.fixture(autouse=True)
def _however_few(monkeypatch):
    """Let the operations run on these small models."""
    monkeypatch.setattr(layers, "FEW", 0)


SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
FAMILIES = ["Llama", "Mistral", "Qwen2", "Qwen3"]


def model_of(family="Llama", seed=0, **fields):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **fields})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        # a weight of ones hides itself
        for name, p in model.named_parameters():
            if "norm" in name:
                p.uniform_(0.5, 1.5)
    return model


def adapted(model, rank=4):
    lc.add_adapter(model, lc.LoraConfig(r=rank, target_modules="all-linear"))
    randomise(model)
    return model


TOKENS = torch.arange(1, 25).view(2, 12)


def results(model, **given):
    """Logits, loss and every gradient of what is trained."""
    model.zero_grad()
    made = model(input_ids=TOKENS, labels=TOKENS, use_cache=False, **given)
    made.loss.backward()
    return [made.logits.detach(), made.loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_same(got, want, rtol=1e-4, atol=1e-5):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def distance(made, truth):
    """How far results are from float64, on average, relative to their norm."""
    # but for the loss: the error of one number says nothing
    pairs = [(m.double(), t) for m, t in zip(made, truth, strict=True) if t.dim()]
    return sum(((m - t).norm() / t.norm()).item() for m, t in pairs) / len(pairs)


def kinds(model, kind):
    return [name for name, m in model.named_modules() if isinstance(m, kind)]


def calls_of(monkeypatch):
    """Count what the operations are called for."""
    seen = []
    for name in ("rms_norm", "swiglu", "rotary"):
        run = getattr(layers, name)
        monkeypatch.setattr(layers, name, lambda *args, name=name, run=run: seen.append(name) or run(*args))
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_results_by_fewer_operations(family, monkeypatch):
    model = adapted(model_of(family))
    want = results(model)
    report = lc.fuse(model, blocks=True)
    # of two layers, with two norms each and the last one; Qwen3 has one for queries and one for keys besides
    norms = 5 + 4 * (family == "Qwen3")
    assert len(kinds(model, FusedRMSNorm)) == norms
    assert len(kinds(model, FusedGatedMLP)) == len(kinds(model, FusedRotation)) == 2
    assert report.blocks == kinds(model, BlockPart)
    assert len(report.shared) == 4
    assert f"{norms + 4} norms, gates and rotations" in str(report)
    seen = calls_of(monkeypatch)
    assert_same(results(model), want)
    assert {name: seen.count(name) for name in seen} == {"rms_norm": norms, "swiglu": 2, "rotary": 4}


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


def test_few_elements_on_a_cpu_are_left_to_the_model(monkeypatch):
    model = adapted(model_of())
    lc.fuse(model, blocks=True)
    seen = calls_of(monkeypatch)
    monkeypatch.setattr(layers, "FEW", TOKENS.numel() * SIZES["hidden_size"] + 1)
    want = results(model)
    # the gate is wider than that
    assert seen == ["swiglu"] * 2
    monkeypatch.setattr(layers, "FEW", TOKENS.numel() * SIZES["hidden_size"])
    assert_same(results(model), want)
    # queries have as many elements, keys of fewer heads go with them
    assert {name: seen.count(name) for name in seen} == {"rms_norm": 5, "swiglu": 4, "rotary": 4}


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


def test_under_autocast_mixed_dtypes_are_left_to_the_model(monkeypatch):
    model = adapted(model_of())
    with torch.autocast("cpu", torch.bfloat16):
        want = results(model)
        lc.fuse(model, blocks=True)
        seen = calls_of(monkeypatch)
        got = results(model)
    # queries are bfloat16, cosines float32
    assert set(seen) == {"rms_norm", "swiglu"}
    assert [m.dtype for m in got] == [m.dtype for m in want]
    # of bfloat16's products, whose roundings a last bit of float32 may turn
    assert distance(got, [m.double() for m in want]) < 0.05


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


@pytest.mark.parametrize("what", ["another activation", "a hook on it", "a hook that changes it"])
def test_a_gate_that_became_another_one_is_called(what):
    model = adapted(model_of())
    lc.fuse(model, blocks=True)
    fused, own = model.model.layers[0].mlp, copy.deepcopy(model).model.layers[0].mlp
    lc.unfuse(own)
    for mlp in (fused, own):
        if what == "another activation":
            mlp.act_fn = nn.GELU()
        else:
            mlp.act_fn.register_forward_hook(lambda m, x, y: 2 * y if "changes" in what else None)
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(fused(x), own(x))


def test_a_compiler_sees_the_model_as_it_was(monkeypatch):
    model = adapted(model_of())
    want = model(input_ids=TOKENS, use_cache=False).logits
    lc.fuse(model, blocks=True)
    seen = calls_of(monkeypatch)
    # tracing stops where transformers makes its mask, but nowhere in a layer
    compiled = torch.compile(model.model.layers[0].mlp, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(compiled(x), model.model.layers[0].mlp(x))
    assert seen == ["swiglu"]
    whole = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(whole(input_ids=TOKENS, use_cache=False).logits, want, rtol=1e-4, atol=1e-5)
    assert "rms_norm" not in seen and "rotary" not in seen


def test_other_models_of_the_process_rotate_as_before(monkeypatch):
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


def test_a_parametrized_norm_is_left():
    norm = modeling_llama.LlamaRMSNorm(12)
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Softplus())
    assert "parametrized" in lc.fuse(norm, blocks=True).skipped[""]
    nn.utils.parametrize.remove_parametrizations(norm, "weight")
    assert lc.fuse(norm, blocks=True).blocks == [""]


def test_what_is_written_otherwise_is_left_and_said():
    gemma = model_of("Gemma", head_dim=8)
    report = lc.fuse(gemma, blocks=True)
    said = {name: reason for name, reason in report.skipped.items() if "proj" not in name and name != "lm_head"}
    assert said["model.norm"] == "GemmaRMSNorm is written otherwise than in transformers' Llama"
    assert said["model.layers.0.mlp"].startswith("its gate is GELUTanh")
    # its rotation is Llama's
    assert report.blocks == ["model.layers.0.self_attn", "model.layers.1.self_attn"]


def test_a_rotation_of_the_same_words_that_turns_the_other_way_is_left():
    """NanoChat's rotate_half is another one than Llama's, which the words of its rotation do not show."""
    model = adapted(model_of("NanoChat"))
    want = results(model)
    report = lc.fuse(model, blocks=True)
    assert "NanoChatAttention is written otherwise" in report.skipped["model.layers.0.self_attn"]
    assert_same(results(model), want)


def other_default(q, k, cos, sin, unsqueeze_dim=2):
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed, k_embed


def test_a_rotation_of_the_same_words_with_another_default_is_left(monkeypatch):
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", other_default)
    report = lc.fuse(model_of(), blocks=True)
    assert "model.layers.0.self_attn" in report.skipped


def doubled(forward):
    @functools.wraps(forward)
    def both(self, x):
        return 2 * forward(self, x)

    return both


class DecoratedMLP(modeling_llama.LlamaMLP):
    forward = doubled(modeling_llama.LlamaMLP.forward)


class DecoratedRMSNorm(modeling_llama.LlamaRMSNorm):
    forward = doubled(modeling_llama.LlamaRMSNorm.forward)


@pytest.mark.parametrize(
    "make", [lambda: DecoratedRMSNorm(32), lambda: DecoratedMLP(transformers.LlamaConfig(**SIZES))]
)
def test_a_decorated_forward_is_left(make):
    module, x = make(), torch.randn(2, 32)
    want = module(x)
    assert "Decorated" in lc.fuse(module, blocks=True).skipped[""]
    assert torch.equal(module(x), want)


class OwnMethod(nn.Module):
    def apply_rotary_pos_emb(self, x):
        return 2 * x

    def forward(self, x):
        return self.apply_rotary_pos_emb(x)


def test_a_method_that_is_called_as_the_rotation_is_left():
    module = OwnMethod()
    report = lc.fuse(module, blocks=True)
    assert report.blocks == [] and report.skipped == {}
    assert torch.equal(module(torch.ones(2)), torch.full((2,), 2.0))


def test_pytorchs_norm_of_a_model_of_ones_own():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.RMSNorm(12), nn.RMSNorm(12, eps=0.1), nn.RMSNorm((3, 12)), nn.RMSNorm(12, elementwise_affine=False)
    )
    x = torch.randn(2, 3, 12)
    want = model(x)
    report = lc.fuse(model, blocks=True)
    assert report.blocks == ["0", "1"]
    assert set(report.skipped.values()) == {"it has no weight, or normalises more than the last dimension"}
    torch.testing.assert_close(model(x), want)
    assert model[0].eps is None and model[1].eps == 0.1
    # what the operation refuses, the module says as ever
    with pytest.raises(RuntimeError, match="normalized_shape"):
        model[0](torch.randn(2, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_pytorchs_norm_chooses_what_it_adds(dtype):
    """In half precision that is not the dtype's own epsilon."""
    norm, x = nn.RMSNorm(12).to(dtype), (1e-3 * torch.arange(1, 37)).sin().view(3, 12).mul(1e-2).to(dtype)
    want = norm(x)
    lc.fuse(norm, blocks=True)
    torch.testing.assert_close(norm(x), want)


@pytest.mark.parametrize("eps", [torch.full((12,), 0.1), torch.full((3, 1), 0.5), -1e-9, float("inf")])
def test_a_norm_that_adds_what_no_operation_takes(eps):
    norm, x = modeling_llama.LlamaRMSNorm(12), torch.arange(36.0).view(3, 12)
    norm.variance_epsilon = eps
    want = norm(x)
    lc.fuse(norm, blocks=True)
    assert torch.equal(norm(x), want)


def test_a_norm_that_learns_what_it_adds():
    norm, x = modeling_llama.LlamaRMSNorm(12), torch.arange(36.0).view(3, 12)
    norm.variance_epsilon = torch.tensor(0.1, requires_grad=True)
    lc.fuse(norm, blocks=True)
    norm(x).square().sum().backward()
    assert norm.variance_epsilon.grad < 0


class Steeper(nn.SiLU):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class SiLUActivation(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(3 * x)


@pytest.mark.parametrize("act", [Steeper, SiLUActivation])
@pytest.mark.parametrize("later", [False, True])
def test_a_gate_that_is_silu_by_name_or_descent_alone(act, later):
    mlp, x = modeling_llama.LlamaMLP(transformers.LlamaConfig(**SIZES)), torch.randn(2, 32)
    own = copy.deepcopy(mlp)
    own.act_fn = act()
    if later:
        lc.fuse(mlp, blocks=True)
    mlp.act_fn = act()
    assert lc.fuse(mlp, blocks=True).blocks == []
    torch.testing.assert_close(mlp(x), own(x))


@pytest.mark.parametrize("act", [nn.SiLU(), nn.SiLU(inplace=True), transformers.activations.SiLUActivation()])
def test_a_gate_that_is_silu(act):
    mlp, x = modeling_llama.LlamaMLP(transformers.LlamaConfig(**SIZES)), torch.randn(2, 32)
    mlp.act_fn = act
    want = mlp(x)
    assert lc.fuse(mlp, blocks=True).blocks == [""]
    torch.testing.assert_close(mlp(x), want)


class Does(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run = run

    def forward(self, x):
        return self.run(x)


class Marked(torch.Tensor):
    """A tensor class of somebody else's."""


def both_ways(module, *given, **options):
    """What a module returns before it is fused and after; what operations were called for is asked apart."""
    want = module(*given, **options)
    assert lc.fuse(module, blocks=True).blocks == [""]
    return want, module(*given, **options)


OTHERWISE = {
    "dtypes that differ": lambda t: t.bfloat16(),
    "one column for all": lambda t: t[..., :1],
    "a tensor class": lambda t: t.as_subclass(Marked),
    "complex numbers": lambda t: t.to(torch.complex64),
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_gates_that_no_operation_takes_are_computed_as_ever(what, monkeypatch):
    mlp = modeling_llama.LlamaMLP(transformers.LlamaConfig(**SIZES))
    change = OTHERWISE[what]
    mlp.gate_proj, mlp.down_proj = Does(change if "c" in what[:2] else lambda x: x), nn.Identity()
    mlp.up_proj = Does(lambda x: change(2 + x.flip(0)))
    seen = calls_of(monkeypatch)
    want, got = both_ways(mlp, torch.randn(2, 5, 32))
    assert type(got) is type(want) and got.dtype == want.dtype and torch.equal(got, want)
    assert seen == []


def test_gates_that_are_nested_are_computed_as_ever():
    mlp = modeling_llama.LlamaMLP(transformers.LlamaConfig(**SIZES))
    mlp.gate_proj = mlp.up_proj = mlp.down_proj = nn.Identity()
    want, got = both_ways(mlp, torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)]))
    assert all(map(torch.equal, got.unbind(), want.unbind()))


def test_a_norm_of_another_dtype_is_computed_as_ever():
    norm = modeling_llama.LlamaRMSNorm(32, eps=0.3)
    x = torch.randn(3, 32)
    want, got = both_ways(norm, x)
    torch.testing.assert_close(got, want)
    want = modeling_llama.LlamaRMSNorm.forward(norm, x.bfloat16())
    assert want.dtype == torch.float32 and torch.equal(norm(x.bfloat16()), want)


@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, lambda x: x.to("meta")], ids=["sparse", "meta"])
def test_what_the_module_refuses_it_refuses_in_its_own_words(change):
    norm, x = modeling_llama.LlamaRMSNorm(32), change(torch.randn(3, 32))
    said = []
    for _ in range(2):
        with pytest.raises((RuntimeError, NotImplementedError)) as error:
            norm(x)
        said.append((error.type, str(error.value)))
        lc.fuse(norm, blocks=True)
    assert said[0] == said[1]


class Rotates(nn.Module):
    """Rotates as an attention does; its forward has defaults of every kind, and a cell."""

    def forward(self, q, k, cos, sin, factor=2.0, *rest, less=1.0, **options):
        assert isinstance(self, __class__)
        q, k = apply_rotary_pos_emb(q, k, cos, sin, *rest, **options)
        return factor * q, factor * k - less


def heads(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g).to(dtype) for s in ((2, 3, 3, 8), (2, 1, 3, 8), (2, 3, 8), (2, 3, 8))]


ROTATED_OTHERWISE = {
    "by position": lambda q, k, cos, sin: ((q, k, cos, sin, 2.0, 2), {}),
    "by name": lambda q, k, cos, sin: ((q, k, cos, sin), {"unsqueeze_dim": 2}),
    "cosines of another dtype": lambda q, k, cos, sin: ((q, k, cos.double(), sin.double()), {}),
    "queries of one sequence": lambda q, k, cos, sin: ((q[0], k, cos, sin), {}),
    "keys of one sequence": lambda q, k, cos, sin: ((q, k[0], cos, sin), {}),
    "cosines that are trained": lambda q, k, cos, sin: ((q, k, cos.requires_grad_(), sin), {}),
    "sines that are trained": lambda q, k, cos, sin: ((q, k, cos, sin.requires_grad_()), {}),
}


@pytest.mark.parametrize("what", ROTATED_OTHERWISE)
def test_rotations_that_no_operation_makes_are_made_as_ever(what, monkeypatch):
    given, options = ROTATED_OTHERWISE[what](*heads())
    seen = calls_of(monkeypatch)
    want, got = both_ways(Rotates(), *given, **options)
    assert all(map(torch.equal, got, want)) and seen == []


def test_a_rotation_keeps_the_defaults_and_cells_of_its_forward(monkeypatch):
    module = Rotates()
    seen = calls_of(monkeypatch)
    want, got = both_ways(module, *heads())
    assert_same(got, want)
    bound = module.forward
    lc.unfuse(module)
    # what was bound while it was fused runs its own forward
    assert all(map(torch.equal, bound(*heads()), want)) and seen == ["rotary"] * 2


def test_a_tracer_sees_the_norm_as_it_was():
    norm, x = nn.RMSNorm(12), torch.randn(3, 12)
    lc.fuse(norm, blocks=True)
    graph = str(torch.jit.trace(norm, x).inlined_graph)
    assert "aten::rms_norm" in graph and "lora_core::" not in graph


def test_a_transform_sees_the_gate_as_it_was(monkeypatch):
    mlp = model_of().model.layers[0].mlp
    lc.fuse(mlp, blocks=True)
    seen = calls_of(monkeypatch)
    torch.func.grad(lambda x: mlp(x).sum())(torch.randn(2, 32))
    assert seen == []


class PlainNorm(nn.RMSNorm):
    """A norm that is PyTorch's no more."""

    def forward(self, x):
        return super().forward(x) + 1


class GatedAlike(modeling_llama.LlamaMLP):
    """Names of Llama's, and another formula."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


class NormOfOtherNames(nn.Module):
    """Llama's norm, whose root is taken of something else."""

    forward = modeling_llama.LlamaRMSNorm.forward

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class SayingRMSNorm(modeling_llama.LlamaRMSNorm):
    def forward(self, hidden_states):
        """Llama's, word for word, with a docstring."""
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class OrderedRMSNorm(modeling_llama.LlamaRMSNorm):
    # arguments that are called otherwise
    def forward(self, input_dtype, hidden_states=None):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


def test_what_is_recognised_and_what_is_not():
    config = transformers.LlamaConfig(**SIZES)
    some = nn.Module()
    some.gate_proj = nn.Identity()
    other_rms = type("OtherRMSNorm", (NormOfOtherNames,), {})()
    gated, gelu = GatedAlike(config), modeling_llama.LlamaMLP(config)
    gelu.act_fn = nn.GELU()
    found = blocks.block_part_class
    assert found(SayingRMSNorm(4)) is FusedRMSNorm
    assert found(modeling_llama.LlamaMLP(config)) is FusedGatedMLP
    assert found(Rotates()) is FusedRotation
    for silu in (nn.SiLU(), transformers.activations.SiLUActivation()):
        mlp = modeling_llama.LlamaMLP(config)
        mlp.act_fn = silu
        assert found(mlp) is FusedGatedMLP
    patched = nn.Identity()
    patched.forward = lambda x: x
    assert found(some) is None and found(PlainNorm(4)) is None and found(patched) is None
    for module in (other_rms, gated, OrderedRMSNorm(4)):
        assert "is written otherwise" in found(module), module
    assert "its gate is GELU" in found(gelu)


def test_a_forward_that_hooks_left_behind_does_not_run_instead(monkeypatch):
    norm = nn.RMSNorm(12)
    norm.forward = norm.forward
    lc.fuse(norm, blocks=True)
    seen = calls_of(monkeypatch)
    norm(torch.randn(3, 12))
    assert seen == ["rms_norm"] and "forward" not in vars(norm)


def test_a_forward_on_the_module_itself_is_left():
    model = model_of()
    norm, mlp, attention = model.model.norm, model.model.layers[0].mlp, model.model.layers[1].self_attn
    for module in (norm, mlp, attention):
        module.forward = lambda *args, forward=module.forward, **kwargs: forward(*args, **kwargs)
    report = lc.fuse(model, blocks=True)
    for name in ("model.norm", "model.layers.0.mlp", "model.layers.1.self_attn"):
        assert "patched on the module itself" in report.skipped[name]
    assert len(report.blocks) == 9 - 3


def test_a_rotation_that_somebody_replaced_is_left(monkeypatch):
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q, k))
    model = model_of()
    report = lc.fuse(model, blocks=True)
    assert "LlamaAttention is written otherwise" in report.skipped["model.layers.0.self_attn"]
    assert not kinds(model, FusedRotation)


def fewer(q, k):
    return q, k


OTHER_LLAMAS = {
    "another norm": (modeling_llama.LlamaRMSNorm, "forward", lambda self, x: self.weight * x),
    "another gate": (modeling_llama.LlamaMLP, "forward", lambda self, x: self.up_proj(x)),
    "another rotation": (modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q, k)),
    "a rotation that takes something else": (modeling_llama, "apply_rotary_pos_emb", fewer),
    "another name": (modeling_llama, "LlamaMLP", nn),
}


@pytest.mark.parametrize("what", OTHER_LLAMAS)
def test_a_llama_that_computes_something_else_is_left(what, monkeypatch):
    """Another version of transformers may mean another thing by the same names."""
    model = model_of()
    monkeypatch.setattr(blocks, "_llama", blocks._llama.__wrapped__)
    monkeypatch.setattr(*OTHER_LLAMAS[what])
    assert blocks._llama() == {}
    assert lc.fuse(model, blocks=True).blocks == []


def test_without_transformers_there_is_pytorchs_norm():
    script = (
        "import sys, torch, lora_core as lc; from torch import nn\n"
        "class OtherRMSNorm(nn.Module):\n"
        "    weight, variance_epsilon = torch.ones(4), 1\n"
        "    def forward(self, x): return x\n"
        "report = lc.fuse(nn.Sequential(nn.RMSNorm(4), OtherRMSNorm()), blocks=True)\n"
        "print(report.blocks, report.skipped, 'transformers' in sys.modules)\n"
        # what was found before it came holds no longer
        "from transformers.models.llama.modeling_llama import LlamaRMSNorm\n"
        "print(lc.fuse(nn.Sequential(LlamaRMSNorm(4)), blocks=True).blocks)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before, after = ran.stdout.strip().splitlines()
    assert before.startswith("['0'] {'1': \"OtherRMSNorm is written otherwise") and before.endswith("False")
    assert after == "['0']"


def test_fusing_draws_no_random_numbers():
    model = model_of()
    before = torch.get_rng_state()
    blocks._llama.cache_clear()
    lc.fuse(model, blocks=True)
    assert torch.equal(torch.get_rng_state(), before)
