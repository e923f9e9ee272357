"""Which norms, gates and attentions fuse(blocks=True) knows, and which it leaves, saying why."""

import copy
import functools
import subprocess
import sys

import pytest
import torch
import transformers
from small_transformers import MARKS, SIZES, Rotates, adapted, assert_same, calls_of, kinds, model_of, results
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import rotate_half

import lora_core as lc
from lora_core.adapt import blocks
from lora_core.layers import block_attention
from lora_core.layers.block_attention import FusedAttention, FusedRotatingAttention
from lora_core.layers.blocks import FusedGatedMLP, FusedRMSNorm

pytestmark = MARKS


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
    assert found(Rotates()) is FusedRotatingAttention
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


def test_what_is_written_otherwise_is_left_and_said():
    gemma = model_of("Gemma", head_dim=8)
    report = lc.fuse(gemma, blocks=True)
    said = {name: reason for name, reason in report.skipped.items() if "proj" not in name and name != "lm_head"}
    assert said["model.norm"] == "GemmaRMSNorm is written otherwise than in transformers' Llama"
    assert said["model.layers.0.mlp"].startswith("its gate is GELUTanh")
    # its rotation is Llama's
    assert report.blocks == ["model.layers.0.self_attn", "model.layers.1.self_attn"]


def test_a_rotation_of_the_same_words_that_turns_the_other_way_is_left(monkeypatch):
    """NanoChat's rotate_half is another one than Llama's, which the words of its rotation do not show."""
    model = adapted(model_of("NanoChat"))
    want = results(model)
    report = lc.fuse(model, blocks=True)
    # what attends after it is as everywhere
    assert kinds(model, FusedAttention) == [n for n in report.blocks if n.endswith("self_attn")] != []
    assert not kinds(model, FusedRotatingAttention)
    seen = calls_of(monkeypatch)
    assert_same(results(model), want)
    assert "rotary" not in seen and seen.count("causal_attention") == 2


def other_default(q, k, cos, sin, unsqueeze_dim=2):
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed, k_embed


def test_a_rotation_of_the_same_words_with_another_default_is_left(monkeypatch):
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", other_default)
    model = model_of()
    lc.fuse(model, blocks=True)
    assert kinds(model, FusedAttention) and not kinds(model, FusedRotatingAttention)


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


def test_a_parametrized_norm_is_left():
    norm = modeling_llama.LlamaRMSNorm(12)
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Softplus())
    assert "parametrized" in lc.fuse(norm, blocks=True).skipped[""]
    nn.utils.parametrize.remove_parametrizations(norm, "weight")
    assert lc.fuse(norm, blocks=True).blocks == [""]


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
    lc.fuse(model, blocks=True)
    assert not kinds(model, FusedRotatingAttention)
    # without what attends there is nothing left
    monkeypatch.setattr(block_attention, "SDPA_FORWARD", ("transformers", "nothing_of_this_name"))
    report = lc.fuse(model_of(), blocks=True)
    assert "LlamaAttention is written otherwise" in report.skipped["model.layers.0.self_attn"]


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
    # but for what attends, which is not Llama's
    assert lc.fuse(model, blocks=True).blocks == kinds(model, FusedAttention)
    assert not kinds(model, FusedRotatingAttention)


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
