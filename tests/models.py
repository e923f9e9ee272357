"""Small models that the tests adapt."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_core.plan.shape import ModelShape


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.q_proj(x)) * self.v_proj(x)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = Attention(width)
        self.up_proj = nn.Linear(width, 2 * width)
        self.down_proj = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.down_proj(F.gelu(self.up_proj(x)))


class TinyDecoder(nn.Module):
    """Embedding, blocks, head: the shape of a language model without attention over time."""

    def __init__(self, vocabulary: int = 37, width: int = 24, depth: int = 3, tied: bool = False) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def tokens(batch: int = 2, length: int = 5, vocabulary: int = 37) -> Tensor:
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


def randomise(model: nn.Module, scale: float = 0.3) -> None:
    """Give every adapter matrix random values, so that no update is zero."""
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=g))


TINY = ModelShape(name="tiny", layers=3, hidden=64, intermediate=160, heads=4, kv_heads=2, vocabulary=97)


def transformers_config(shape: ModelShape):
    """The configuration with which transformers builds a model of this shape."""
    import transformers

    if shape.positions:
        return transformers.GPT2Config(
            n_layer=shape.layers,
            n_embd=shape.hidden,
            n_inner=shape.intermediate,
            n_head=shape.heads,
            vocab_size=shape.vocabulary,
            n_positions=shape.positions,
            activation_function="gelu_pytorch_tanh",
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        )
    kind = transformers.Qwen2Config if shape.qkv_bias else transformers.LlamaConfig
    if shape.head_norms:
        kind = partial(transformers.Qwen3Config, head_dim=shape.head_width)
    return kind(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
    )


def transformers_model(shape: ModelShape = TINY, dtype: torch.dtype = torch.float32):
    """A causal language model of this shape with random weights."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(transformers_config(shape), attn_implementation="sdpa").to(dtype)


def recompute_activations(model: nn.Module, **keywords: object) -> None:
    """Switch activation checkpointing on, by the name that the transformers installed has for it."""
    switch = getattr(model, "activation_checkpointing_enable", None)
    if switch is not None:
        switch(**keywords)
    else:
        # transformers 5.17 and before
        model.gradient_checkpointing_enable(**{k.replace("activation", "gradient"): v for k, v in keywords.items()})
