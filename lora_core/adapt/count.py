"""How many parameters a model has, and how many of them are trained."""

import math

from torch import nn

from lora_core.adapt.walk import named_modules
from lora_core.quant import QuantizedWeight


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return (trainable, all) parameters; a quantised weight counts the weights it stands for."""
    quantized = sum(m.shape.numel() for _, m in named_modules(model) if isinstance(m, QuantizedWeight))
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return trainable, sum(_weights(p) for p in parameters) + quantized


def _weights(parameter: nn.Parameter) -> int:
    """Return how many weights a parameter holds: one that bitsandbytes has packed says so."""
    packed = getattr(parameter, "quant_state", None)
    return math.prod(packed.shape) if packed is not None else parameter.numel()


def print_trainable_parameters(model: nn.Module) -> None:
    """Print `trainable params: X || all params: Y || trainable%: Z`, in PEFT's format.

    Args:
        model: any module; a quantised weight counts the weights it stands for.
    """
    trainable, total = count_parameters(model)
    share = 100 * trainable / total if total else 0.0
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")
