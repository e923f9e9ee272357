"""From documents to batches, and the loss in nats per byte."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_core.demo.tokenizer import SEPARATOR, Tokenizer

# keeps the streams of batches and of dropout apart
DROPOUT_STREAM = 1 << 40


def token_stream(documents: Sequence[str], tokenizer: Tokenizer) -> Tensor:
    """All documents behind one another, each after a separator: int64 of shape [tokens]."""
    tokens: list[int] = []
    for document in documents:
        tokens.append(SEPARATOR)
        tokens.extend(tokenizer.encode(document))
    return torch.tensor(tokens, dtype=torch.int64)


def training_batch(stream: Tensor, batch: int, context: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and next tokens of random windows, each [batch, context]; they depend on the seed and the step alone."""
    generator = torch.Generator().manual_seed((seed << 20) + step)
    starts = torch.randint(len(stream) - context, (batch, 1), generator=generator)
    windows = stream[starts + torch.arange(context + 1)]
    return windows[:, :-1], windows[:, 1:]


def seed_dropout(seed: int, step: int) -> None:
    """Makes the step's dropout depend on the seed and the step alone, so that a resumed run repeats it."""
    torch.manual_seed(DROPOUT_STREAM + (seed << 20) + step)


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats per token."""
    return F.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten())


@torch.no_grad()
def nats_per_byte(
    model: nn.Module, stream: Tensor, tokenizer: Tokenizer, context: int, limit: int | None = None
) -> float:
    """Total cross entropy of a stream cut into windows, over the bytes that its tokens spell.

    Args:
        model: maps tokens [batch, context] to logits; its training mode is restored.
        stream: int64 of shape [tokens].
        tokenizer: spells the tokens.
        context: tokens a window.
        limit: only this many windows, spread evenly over the stream; all when None.
    Returns:
        Nats per byte: comparable between tokenizers. Separators cost nats and spell nothing.
    """
    count = (len(stream) - 1) // context
    chosen = torch.arange(count)
    if limit is not None and limit < count:
        chosen = torch.arange(limit) * count // limit
    windows = stream[chosen[:, None] * context + torch.arange(context + 1)]
    lengths = torch.tensor([len(spelling) for spelling in tokenizer.spelling])
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    nats = 0.0
    for part in windows.split(32):
        part = part.to(device)
        loss = F.cross_entropy(model(part[:, :-1]).flatten(0, 1).double(), part[:, 1:].flatten(), reduction="sum")
        nats += loss.item()
    model.train(was_training)
    return nats / int(lengths[windows[:, 1:]].sum())
