"""Small transformers, parts of them, and their results, for the tests of fuse(blocks=True)."""

import fusible
import pytest
import torch
import transformers
from models import randomise
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import lora_core as lc
from lora_core.layers import block_attention, blocks

# of the files that test such models
MARKS = [*fusible.MARKS, pytest.mark.usefixtures("however_few")]

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
# of models that rotate a part of each head, or not at all
OWN_SIZES = {
    "GPT2": {"n_positions": 64, "n_inner": 48, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "GPTNeoX": {"rotary_pct": 0.5},
    "Phi": {},
}
FAMILIES = ["Llama", "Mistral", "Qwen2", "Qwen3"]
TOKENS = torch.arange(1, 25).view(2, 12)


def model_of(family="Llama", seed=0, **fields):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **OWN_SIZES.get(family, {}), **fields})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
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
    called_by = {"rms_norm": blocks, "swiglu": blocks, "rotary": block_attention, "causal_attention": block_attention}
    for name, module in called_by.items():
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, name=name, run=run: seen.append(name) or run(*args))
    return seen


def attentions(monkeypatch):
    """Return what says how often the operation attended since it was asked last."""
    # this compares it with transformers' function once
    block_attention.sdpa_forward()
    seen = calls_of(monkeypatch)

    def count():
        found = seen.count("causal_attention")
        seen.clear()
        return found

    return count


def both_ways(module, *given, **options):
    """What a module returns before it is fused and after; what operations were called for is asked apart."""
    want = module(*given, **options)
    assert lc.fuse(module, blocks=True).blocks == [""]
    return want, module(*given, **options)


class Rotates(nn.Module):
    """Rotates as an attention does; its forward has defaults of every kind, and a cell."""

    def forward(self, q, k, cos, sin, factor=2.0, *rest, less=1.0, **options):
        assert isinstance(self, __class__)
        q, k = apply_rotary_pos_emb(q, k, cos, sin, *rest, **options)
        return factor * q, factor * k - less


def heads(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g).to(dtype) for s in ((2, 3, 3, 8), (2, 1, 3, 8), (2, 3, 8), (2, 3, 8))]
