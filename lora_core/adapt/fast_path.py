"""nn.TransformerEncoderLayer's inference path, which reads the weights of its linear layers past their forward.

With an adapted layer inside, it would return the base model's output in eval mode without a word.
"""

from torch import nn

MARK = "lora_core_fast_path"


def forbid_fast_path(parent: nn.Module) -> None:
    """Make nn.TransformerEncoderLayer call its linear layers: in eval mode it would read their weights past them."""
    if isinstance(parent, nn.TransformerEncoderLayer) and MARK not in parent.__dict__:
        parent.__dict__[MARK] = parent.activation_relu_or_gelu
        parent.activation_relu_or_gelu = 0


def allow_fast_path(module: nn.Module) -> None:
    """Undo forbid_fast_path."""
    if MARK in module.__dict__:
        module.activation_relu_or_gelu = module.__dict__.pop(MARK)
