"""Which of the model's own biases an adapter trains, and so saves."""

from collections.abc import Iterator

from torch import nn

from lora_core.adapt.walk import layers_of, trainable_copies


def trained_biases(model: nn.Module, adapter_name: str, which: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield name and bias of what an adapter trains whose LoraConfig.bias is "none", "all" or "lora_only".

    Of "lora_only" those of the layers it adapts. A bias reached by two names comes by each, as in PEFT's checkpoints.
    """
    if which == "none":
        return
    adapted = tuple(f"{name}.base_layer." for name in layers_of(model, adapter_name))
    # a module trained whole has its own bias, and its original none to train
    whole = tuple(f"{name}." for name in trainable_copies(model))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        is_bias = name.split(".")[-1] == "bias" and parameter.is_floating_point()
        if is_bias and not name.startswith(whole) and (which == "all" or name.startswith(adapted)):
            yield name, parameter
