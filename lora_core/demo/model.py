"""A small GPT in plain PyTorch: what the demo pre-trains, quantises and adapts."""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# wavelengths of the rotary embedding run from 2 pi to 2 pi times this (Su et al. 2021, section 3.2.2)
ROTARY_BASE = 10_000.0
# standard deviation of the initial weights (Radford et al. 2019, as released)
INITIAL_STD = 0.02
# float32's machine epsilon, which nn.RMSNorm takes by itself; stated so that other dtypes compute the same function
NORM_EPS = 2.0**-23


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT."""

    vocabulary: int = 1024
    context: int = 128
    width: int = 256
    layers: int = 4
    heads: int = 4
    dropout: float = 0.1

    def as_dict(self) -> dict[str, int | float]:
        """The fields by name."""
        return asdict(self)


class Attention(nn.Module):
    """Causal self-attention with rotary positions: softmax(q k^T / sqrt(d)) v."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.width, config.width, bias=False)
        self.k_proj = nn.Linear(config.width, config.width, bias=False)
        self.v_proj = nn.Linear(config.width, config.width, bias=False)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [batch, heads, tokens, width / heads]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """down(gelu(up(x)))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down_proj = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=NORM_EPS)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width, eps=NORM_EPS)
        self.mlp = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), cos, sin))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class GPT(nn.Module):
    """Predicts the next token; the output layer shares the embedding's weight (Press and Wolf 2017)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocabulary, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=NORM_EPS)
        cos, sin = rotary_tables(config.context, config.width // config.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # layers that add to the residual stream start smaller (Radford et al. 2019, section 2.3)
                into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=INITIAL_STD / (2 * config.layers) ** 0.5 if into_stream else INITIAL_STD)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token.

        Args:
            tokens: int64 of shape [batch, tokens], at most config.context of them.
        Returns:
            Same dtype as the weights, shape [batch, tokens, vocabulary].
        """
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        x = self.dropout(self.embed_tokens(tokens))
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight)


def rotary_tables(context: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position times frequency, each of shape [context, width / 2]."""
    frequency = ROTARY_BASE ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    angle = torch.outer(torch.arange(context, dtype=torch.float32), frequency)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x_i, x_{i + width/2}) of [..., tokens, width] by its position's angle."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
