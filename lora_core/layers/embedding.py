"""LoRA on nn.Embedding.

    y = E[tokens] + s (A^T)[tokens] B^T        E [V, D], A [R, V], B [D, R]

A row of A^T is looked up for each token, so the cost does not grow with the vocabulary. Here A starts at zero and B
random, the other way round than in a linear layer. Source: loralib, and PEFT's checkpoint format.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_core.layers.adapter import AdapterLayer, reads_from_base
from lora_core.layers.as_written import runs_as_written


@reads_from_base(
    "num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"
)
class LoraEmbedding(AdapterLayer):
    """An embedding with low-rank adapters.

    Args:
        base_layer: nn.Embedding, weight [V, D].
    """

    base_layer: Any

    PEFT_A: ClassVar[str] = "lora_embedding_A"
    PEFT_B: ClassVar[str] = "lora_embedding_B"

    def pair_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, self.base_layer.num_embeddings), (self.base_layer.embedding_dim, rank)

    def why_unmergeable(self) -> str:
        if self.base_layer.max_norm is not None:
            return f"it scales the rows it looks up down to max_norm={self.base_layer.max_norm:g}, the update with them"
        return super().why_unmergeable()

    def product(self, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        return (lora_b @ lora_a).T

    def response(self, x: Tensor, change: Tensor) -> Tensor:
        return F.embedding(x, change) * self.embed_scale

    def sample_input(self) -> Tensor:
        return torch.randint(self.base_layer.num_embeddings, (4,), device=self.weight.device)

    def is_as_written(self) -> bool:
        return runs_as_written(self.base_layer, nn.Embedding.forward)

    @property
    def embed_scale(self) -> Any:
        """What some transformers embeddings multiply their output with; the adapter's share is scaled alike."""
        return getattr(self.base_layer, "embed_scale", 1.0)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the embeddings of tokens, integers of any shape [...], as [..., D] in the base's dtype."""
        y = self.base_layer(input, *args, **kwargs)
        for name in self.running():
            lora_a, lora_b = self.matrices(name, input)
            hidden = F.embedding(
                input,
                lora_a.T,
                padding_idx=self.base_layer.padding_idx,
                scale_grad_by_freq=self.base_layer.scale_grad_by_freq,
            )
            low_rank = (hidden @ lora_b.T) * (self.adapters[name].scaling * self.embed_scale)
            y = y + low_rank.to(y.dtype)
        return self.handed_out(y)
