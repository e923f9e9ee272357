"""Text that a model writes after a prompt."""

import torch
from torch import nn

from lora_core.demo.base import Base
from lora_core.demo.text import Text

TEMPERATURE = 0.7
PROMPT_TOKENS = 48


def prompt_of(text: Text) -> list[int]:
    """The beginning of a piece of held-out code: tokens from the middle of the stream, after a line break."""
    stream = text.code_held_out.tolist()
    return stream[len(stream) // 2 :][:PROMPT_TOKENS]


@torch.no_grad()
def write(model: nn.Module, base: Base, prompt: list[int], length: int, seed: int) -> str:
    """What the model writes after the prompt, drawn at TEMPERATURE with a seed of its own.

    Args:
        model: maps tokens [1, tokens] to logits.
        base: its context and tokenizer.
        prompt: tokens.
        length: tokens to write.
        seed: equal seeds and models write equal text.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    tokens = list(prompt)
    for _ in range(length):
        window = torch.tensor([tokens[-base.config.context :]], device=device)
        # drawn on the CPU, so that a GPU's own random stream does not matter
        odds = (model(window)[0, -1].float().cpu() / TEMPERATURE).softmax(-1)
        tokens.append(int(torch.multinomial(odds, 1, generator=generator)))
    return base.tokenizer.decode(tokens[len(prompt) :])
