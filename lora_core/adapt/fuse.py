"""fuse: run a model's adapted and 4-bit layers by the fused operations, whichever library made them."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lora_core.adapt.blocks import block_part_class
from lora_core.adapt.called_together import called_together
from lora_core.adapt.kinds import has_pefts_adapter, is_transposed_linear
from lora_core.adapt.walk import named_modules
from lora_core.errors import AdapterError
from lora_core.layers.adapter import AdapterLayer
from lora_core.layers.as_written import is_patched, is_sharded
from lora_core.layers.bitsandbytes_weight import is_four_bit, why_unreadable
from lora_core.layers.blocks import BlockPart
from lora_core.layers.fused import Fused, fused_class
from lora_core.layers.fused_lora import FusedLora
from lora_core.layers.fused_peft import FusedBitsandbytes, FusedPeft, is_as_written, oddity, own_forward
from lora_core.layers.linear import LoraLinear
from lora_core.layers.nf4_linear import NF4Linear
from lora_core.layers.siblings import Siblings

ALTERED = "its base layer has hooks or a forward of its own, which one operation would pass by"
NOTHING = "neither adapted nor in 4 bits: there is nothing to fuse"


@dataclass(frozen=True)
class FuseReport:
    """What fuse did.

    Args:
        swapped: names of the layers that run a fused operation from now on.
        skipped: why each other linear, adapted or quantised layer was not swapped now, by name; one that was fused
            before is among them.
        shared: groups of the swapped layers that their parent calls with one x, which they read once together.
        blocks: names of the modules between the layers whose norm, gate, rotation or attention is one operation from
            now on, wherever it can be: see fuse.
    """

    swapped: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    shared: list[tuple[str, ...]] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} layers fused, {len(self.skipped)} left as they are"]
        if self.shared:
            lines.append(
                f"  {sum(map(len, self.shared))} of them in {len(self.shared)} groups that read their input once"
            )
        if self.blocks:
            lines.append(f"  {len(self.blocks)} norms, gates and attentions between them fused")
        return "\n".join([*lines, *(f"  {name}: {reason}" for name, reason in self.skipped.items())])


def fuse(model: nn.Module, share: bool = True, blocks: bool = False) -> FuseReport:
    """Make a model's layers run one operation for base weight, adapter, dropout and bias, in place.

    Takes this library's adapters and NF4 layers, PEFT's LoRA on nn.Linear, transformers' Conv1D and bitsandbytes'
    Linear4bit, and a Linear4bit without adapter. Parameters and packed bytes are shared, the layers are the same
    objects under the same names: an optimiser, a state dict and PEFT's own verbs go on working. Outputs and gradients
    are the same up to rounding; in training, dropout's masks are drawn by this library's generator.

    Adapted layers without dropout that their parent's forward calls with one variable, as query, key and value or gate
    and up, read it once together: the first called computes for all of them, and each returns its own output when it is
    called. Their backward is one, too: where losses of their outputs go backward one after the other, pass share=False.

    With blocks=True, what stands between the linear layers of a transformer's blocks is fused as well: RMS norms, the
    gate of an MLP, the rotation of queries and keys, each by one operation that keeps its inputs alone for the
    backward. Taken are torch.nn.RMSNorm and what is written word for word as in transformers' Llama; torch.compile,
    which fuses these itself, is let. On a CPU a few thousand elements, as of one token, are left to PyTorch's
    operations. There causal attention is an operation, too, in float32, wherever one of transformers' modules would
    have PyTorch's scaled_dot_product_attention attend by is_causal alone: without a mask, as none is made where no
    token is padding, without dropout, and not to tokens of a cache. That takes Numba, 160 tokens, heads of whole
    vectors of the processor, 64 numbers at least, and as many of them as keep all threads busy.

    Args:
        model: any module; layers already fused are left so.
        share: whether layers of one input read it together; what shares already goes on.
        blocks: whether to fuse what stands between the linear layers of a transformer's blocks, too.
    Returns:
        What was swapped, and why each other layer was not.
    Raises:
        ConfigError: if the model is no module.
    Source: Hu et al. 2021, eq. 3; Dettmers et al. 2023, eq. 5.
    """
    report = FuseReport()
    inside: str | None = None
    module: Any
    for name, module in named_modules(model):
        if inside is not None and name.startswith(inside):
            continue
        found = _mixin(module)
        if found is None:
            continue
        # what this layer holds comes right behind it
        inside = f"{name}." if name else ""
        _swap(report, report.swapped, name, module, found)
    for name, module in model.named_modules() if share else ():
        report.shared.extend(_share(name, module))
    for name, module in named_modules(model) if blocks else ():
        if (found := block_part_class(module)) is not None:
            _swap(report, report.blocks, name, module, found)
    return report


def _swap(report: FuseReport, names: list[str], name: str, module: Any, found: type[Fused] | str) -> None:
    """Give a module the class that fuses it and add its name to those, or say in the report why it has none."""
    if isinstance(found, str):
        report.skipped[name] = found
        return
    # a forward of its class that hooks have left behind would run instead of the fused one
    module.__dict__.pop("forward", None)
    module.__class__ = fused_class(found, type(module))
    names.append(name)


def _share(name: str, parent: nn.Module) -> Iterator[tuple[str, ...]]:
    """Make siblings of the adapted layers that parent calls with one x; yield their names."""
    if isinstance(parent, Fused) and not isinstance(parent, BlockPart):
        return
    for children in called_together(parent):
        found = {f"{name}.{child}" if name else child: getattr(parent, child, None) for child in children}
        members: dict[str, Any] = {n: m for n, m in found.items() if isinstance(m, (FusedLora, FusedPeft))}
        once = len({id(member) for member in members.values()}) == len(members)
        if len(members) > 1 and once and not any(member.siblings for member in members.values()):
            siblings = Siblings(list(members.values()))
            for member in members.values():
                member.siblings = siblings
            yield tuple(members)


def unfuse(model: nn.Module) -> nn.Module:
    """Give every fused layer its own forward back, in place; return model.

    Layers elsewhere that read their input together with one of them are fused still, each on its own.

    Args:
        model: any module.
    Returns:
        model.
    Raises:
        AdapterError: if a layer's class was swapped once more since, naming it; the model is unchanged.
        ConfigError: if the model is no module.
    """
    fused: dict[str, Any] = {name: module for name, module in named_modules(model) if isinstance(module, Fused)}
    for name, module in fused.items():
        if "fused_from" not in vars(type(module)):
            raise AdapterError(
                f"unfuse: {name} has become a {type(module).__name__} since it was fused: undo that first, as "
                "torch.nn.utils.parametrize.remove_parametrizations does"
            )
    for module in fused.values():
        for member in module.siblings.members if module.siblings else ():
            member.__dict__.pop("siblings", None)
        module.__class__ = type(module).fused_from
    return model


def _mixin(module: nn.Module) -> type[Fused] | str | None:
    """Return what fuses this layer, why nothing does, or None for a module that is no such layer."""
    if isinstance(module, BlockPart):
        return None
    if isinstance(module, Fused):
        return "it is fused already"
    found = _candidate(module)
    if isinstance(found, type) and is_patched(module):
        return "its forward is patched on the layer itself, as accelerate's hooks do: take the patch off first"
    return found


def _candidate(module: nn.Module) -> type[Fused] | str | None:
    if isinstance(module, AdapterLayer):
        return _own(module)
    if isinstance(module, NF4Linear):
        return Fused
    lora = getattr(sys.modules.get("peft.tuners.lora.layer"), "LoraLayer", None)
    if lora is not None and isinstance(module, lora):
        return _peft(module)
    if has_pefts_adapter(module):
        return f"PEFT's {type(module).__name__} is no LoRA layer"
    if isinstance(module, nn.Linear) and is_four_bit(module):
        # the layer's own hooks are called around its forward, whichever that is
        if type(module).forward is not own_forward(module):
            return f"{type(module).__name__} has a forward of its own"
        return why_unreadable(module) or FusedBitsandbytes
    if type(module).__module__.startswith("bitsandbytes."):
        return f"bitsandbytes' {type(module).__name__} has no fused operation"
    if isinstance(module, nn.Linear) or is_transposed_linear(module):
        return NOTHING
    return None


def _own(layer: AdapterLayer) -> type[Fused] | str:
    if not isinstance(layer, LoraLinear):
        return f"{type(layer).__name__} has no fused operation: its base layer is no linear one"
    if layer.is_altered():
        return ALTERED
    return FusedLora


def _peft(layer: Any) -> type[Fused] | str:
    own = [
        getattr(sys.modules.get("peft.tuners.lora.layer"), "Linear", None),
        getattr(sys.modules.get("peft.tuners.lora.bnb"), "Linear4bit", None),
    ]
    name, base = type(layer).__name__, layer.base_layer
    if type(layer) not in own:
        return f"PEFT's {type(layer).__module__}.{name} has no fused operation"
    variants = sorted({type(v).__name__ for v in layer.lora_variant.values()})
    if variants:
        return f"PEFT's {', '.join(variants)} is more than LoRA: no fused operation computes it"
    if not isinstance(base, nn.Linear) and not is_transposed_linear(base):
        return f"its base layer is a {type(base).__name__}: want nn.Linear, Conv1D or Linear4bit"
    if not is_as_written(base) and not is_sharded(base.weight):
        return ALTERED
    for adapter in layer.lora_A:
        if odd := oddity(layer, adapter):
            return f"adapter {adapter!r} {odd}"
    return why_unreadable(base) or FusedPeft if is_four_bit(base) else FusedPeft
