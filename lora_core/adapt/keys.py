"""An adapter's tensors by the names they have in PEFT's checkpoints.

base_model.model.<module>.lora_A.weight     no adapter name in it, so that it can be loaded under another
"""

import re
from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from lora_core.adapt.biases import trained_biases
from lora_core.adapt.walk import adapter_layers, layers_of, plain_name, stated_embeddings, trainable_copies
from lora_core.errors import CheckpointError
from lora_core.layers.embedding import LoraEmbedding
from lora_core.methods.lora import LoraConfig
from lora_core.quant import QuantizedWeight

PREFIX = "base_model.model."

# What PEFT calls the embeddings whose weights it saves beside an adapter that targets them.
EMBEDDINGS = ("embed_tokens", "lm_head")

# Some training frameworks write the names that PEFT has in memory, with the adapter's in the middle or at the end.
NAMED_PAIR = re.compile(r"\.(lora_[AB])\.[^.]+\.weight$")
NAMED_EMBEDDING = re.compile(r"\.(lora_embedding_[AB])\.[^.]+$")

# With bias="all" PEFT itself writes the biases of modules_to_save so once more, the adapter's name left out of some.
NAMED_COPY = re.compile(r"\.modules_to_save\.([^.]+\.)?")


# How other tools name the two matrices, by what their names hold.
OTHER_TOOLS = {
    ".lora_down.": "kohya's",
    ".lora.down.": "diffusers'",
    ".lora_a": "MLX's or torchtune's",
}


def other_tool(names: Iterable[str]) -> str:
    """Return whose names a file's are if they are not PEFT's, with what to do; "" of PEFT's."""
    found = list(names)
    whose = next((tool for part, tool in OTHER_TOOLS.items() if any(part in name for name in found)), "")
    if not whose and any(".lora_A." in name and not name.startswith(PREFIX) for name in found):
        whose = f"without {PREFIX!r} in front"
    return whose and f"The names are {whose}: want PEFT's, {PREFIX}<module>.lora_A.weight; convert the file first"


def key(*parts: str) -> str:
    """Return the checkpoint's name of a tensor of this module."""
    return PREFIX + plain_name(".".join(p for p in parts if p))


def canonical(name: str) -> str | None:
    """Return a checkpoint's name without what depends on which adapters its model had, or None to ignore it."""
    if ".original_module." in name:
        return None
    name = NAMED_EMBEDDING.sub(r".\1", NAMED_PAIR.sub(r".\1.weight", name))
    return NAMED_COPY.sub(".", name.replace(".base_layer.", "."))


def adapter_tensors(model: nn.Module, adapter_name: str, config: LoraConfig) -> dict[str, Tensor]:
    """Return all that belongs to an adapter, the model's own tensors, by checkpoint name."""
    found: dict[str, Tensor] = {}
    for name, layer in layers_of(model, adapter_name).items():
        found[key(name, layer.PEFT_A)] = layer.lora_a.bring(adapter_name)
        found[key(name, layer.PEFT_B)] = layer.lora_b.bring(adapter_name)
    for name, copies in trainable_copies(model).items():
        if adapter_name in copies.copies:
            found.update(_copied(name, copies.copies[adapter_name]))
    found.update(_biases(model, adapter_name, config))
    return found


def base_tensors(model: nn.Module, config: LoraConfig) -> dict[str, Tensor | None]:
    """Return the base model's tensors that PEFT may save with an adapter, by canonical name; None: not to be loaded."""
    found: dict[str, Tensor | None] = {}
    if config.bias == "all":
        # an attention mask called bias, as GPT-2 had
        found.update({key(n): None for n, _ in model.named_buffers() if n.split(".")[-1] == "bias"})
    layers = adapter_layers(model)
    copies = trainable_copies(model)
    for name, module in embeddings(model):
        if name in copies:
            continue
        base = layers[name].base_layer if name in layers else module
        if isinstance(getattr(base, "weight", None), QuantizedWeight):
            found[key(name, "weight")] = None
        found.update({key(name, n): p for n, p in base.named_parameters(recurse=False)})
    return found


def embeddings(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the embeddings, and the output layer of a language model, by name."""
    known = [stated_embeddings(model, side) for side in ("input", "output")]
    for name, module in model.named_modules():
        said = any(module is m for m in known)
        if said or isinstance(module, LoraEmbedding) or name.split(".")[-1] in EMBEDDINGS:
            yield name, module


def _copied(name: str, module: nn.Module) -> dict[str, Tensor]:
    if any(isinstance(m, QuantizedWeight) for m in module.modules()):
        raise CheckpointError(
            f"modules_to_save holds {name}, which is quantised and so cannot be trained or saved whole: leave it out "
            "of quantize_model with skip_modules, or adapt it with target_modules"
        )
    state = module.state_dict(keep_vars=True)
    return {key(name, k): t for k, t in state.items() if isinstance(t, Tensor)}


def _biases(model: nn.Module, adapter_name: str, config: LoraConfig) -> dict[str, Tensor]:
    """Return the base model's biases that this adapter trains.

    A layer that another adapter alone has wrapped keeps its plain name: without that adapter there is no wrapper.
    """
    others = [f"{name}.base_layer." for name, m in adapter_layers(model).items() if adapter_name not in m.adapters]
    found: dict[str, Tensor] = {}
    for name, parameter in trained_biases(model, adapter_name, config.bias):
        wrapper = next((prefix for prefix in others if name.startswith(prefix)), None)
        plain = name if wrapper is None else name.replace(wrapper, wrapper.removesuffix("base_layer."), 1)
        found[key(plain)] = parameter
    return found
