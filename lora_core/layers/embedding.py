"""LoRA on nn.Embedding.

    y = E[tokens] + s (A^T)[tokens] B^T        E [V, D], A [R, V], B [D, R]

A row of A^T is looked up for each token, so the cost does not grow with the vocabulary. Here A starts at zero and B
random, the other way round than in a linear layer. Source: loralib, and PEFT's checkpoint format.
"""

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from lora_core.layers.adapter import AdapterLayer


class LoraEmbedding(AdapterLayer):
    """An embedding with low-rank adapters.

    Args:
        base_layer: nn.Embedding, weight [V, D].
    """

    base_layer: Any

    PEFT_A: ClassVar[str] = "lora_embedding_A"
    PEFT_B: ClassVar[str] = "lora_embedding_B"

    @property
    def num_embeddings(self) -> int:
        return int(self.base_layer.num_embeddings)

    @property
    def embedding_dim(self) -> int:
        return int(self.base_layer.embedding_dim)

    def pair_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, self.num_embeddings), (self.embedding_dim, rank)

    def why_unmergeable(self) -> str:
        if self.base_layer.max_norm is not None:
            return f"it scales the rows it looks up down to max_norm={self.base_layer.max_norm:g}, the update with them"
        return super().why_unmergeable()

    def product(self, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        return (lora_b @ lora_a).T

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the embeddings of tokens, integers of any shape [...], as [..., D] in the base's dtype."""
        y = self.base_layer(tokens, *args, **kwargs)
        # some transformers embeddings scale their output; the adapter's share is scaled alike
        embed_scale = getattr(self.base_layer, "embed_scale", 1.0)
        for name in self.running():
            hidden = F.embedding(tokens, self.lora_a[name].T, padding_idx=self.base_layer.padding_idx)
            low_rank = (hidden @ self.lora_b[name].T) * (self.adapters[name].scaling * embed_scale)
            y = y + low_rank.to(y.dtype)
        return y
