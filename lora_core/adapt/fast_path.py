"""Inference paths of nn.TransformerEncoder that read the weights of its linear layers past their forward.

With an adapted layer inside they would return the base model's output in eval mode without a word; with a quantised
one they fail, as does an adapted layer on the nested tensors they make of padded input.
"""

from torch import nn

from lora_core.layers.adapter import AdapterLayer
from lora_core.layers.nf4_linear import NF4Linear

MARK = "lora_core_fast_path"

# what each module asks itself before it takes that path, and the answer that keeps it off it
SWITCHES: dict[type[nn.Module], tuple[str, int | bool]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}


def settle_fast_paths(model: nn.Module) -> None:
    """Keep encoders with a layer of this library inside off those paths, and let the others take them."""
    for module in model.modules():
        for kind, (switch, off) in SWITCHES.items():
            if not isinstance(module, kind):
                continue
            own = any(isinstance(inner, (AdapterLayer, NF4Linear)) for inner in module.modules())
            if own and MARK not in module.__dict__:
                module.__dict__[MARK] = getattr(module, switch)
                setattr(module, switch, off)
            elif not own and MARK in module.__dict__:
                setattr(module, switch, module.__dict__.pop(MARK))
