"""Text that a model writes after a prompt."""

import torch
from torch import nn

from lora_core.demo.base import Base
from lora_core.demo.text import Text

TEMPERATURE = 0.7
PROMPT_TOKENS = 64
METHOD = "\n    def "


def prompt_of(text: Text, base: Base) -> list[int]:
    """A piece of held-out code that ends with the first line of a method, found from the middle on."""
    code = "".join(text.corpus.code.held_out)
    start = code.find(METHOD, len(code) // 2)
    end = code.find("\n", start + len(METHOD)) + 1 if start >= 0 else 0
    return base.tokenizer.encode(code[:end] if end else code)[-PROMPT_TOKENS:]


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
