"""What fused norms, gates and rotations leave to the forwards they were written with."""

import copy

import pytest
import torch
import transformers
from small_transformers import (
    MARKS,
    SIZES,
    TOKENS,
    Rotates,
    adapted,
    assert_same,
    both_ways,
    calls_of,
    distance,
    heads,
    model_of,
    results,
)
from torch import nn
from transformers.models.llama import modeling_llama

import lora_core as lc
from lora_core.layers import blocks as layers

pytestmark = MARKS


def test_few_elements_on_a_cpu_are_left_to_the_model(monkeypatch):
    model = adapted(model_of())
    lc.fuse(model, blocks=True)
    seen = calls_of(monkeypatch)
    monkeypatch.setattr(layers, "FEW", TOKENS.numel() * SIZES["hidden_size"] + 1)
    want = results(model)
    # the gate is wider than that; what attends is asked of its loops
    assert [name for name in seen if name != "causal_attention"] == ["swiglu"] * 2
    monkeypatch.setattr(layers, "FEW", TOKENS.numel() * SIZES["hidden_size"])
    assert_same(results(model), want)
    # queries have as many elements, keys of fewer heads go with them
    assert {name: seen.count(name) for name in seen} == {
        "rms_norm": 5,
        "swiglu": 4,
        "rotary": 4,
        "causal_attention": 4,
    }


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


class Does(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run = run

    def forward(self, x):
        return self.run(x)


class Marked(torch.Tensor):
    """A tensor class of somebody else's."""


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
