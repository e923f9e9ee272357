"""save_adapter: write an adapter in PEFT's layout."""

import dataclasses
import math
import os
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.adapt.configuration import config_to_peft
from lora_core.adapt.files import folder_path
from lora_core.adapt.keys import adapter_tensors, key
from lora_core.adapt.peft_differs import warn_where_peft_differs
from lora_core.adapt.resolved import resolved
from lora_core.adapt.walk import layers_of, parts, require_adapters, unwrapped
from lora_core.adapt.warn import warn
from lora_core.adapt.write_files import write_checkpoint
from lora_core.errors import CheckpointError
from lora_core.layers.nf4_linear import LoraNF4Linear
from lora_core.methods.lora import LoraConfig


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Write adapter_config.json and adapter_model.safetensors, which PEFT and load_adapter read.

    An adapter started by "pissa" or "olora" is written as a plain one of twice the rank for the original base weight:
    A' = [A; A0], B' = [B, -B0]; on a 4-bit weight, of which what the start left was quantised anew, up to that
    rounding. Patterns of rank or alpha that contradict each other at a layer are written as whole names, so that their
    order, which PEFT changes, means nothing. A process killed while saving leaves the previous checkpoint whole. Saving
    while merged is allowed. Of a model that processes share, every process has to call it: after fully_shard as it is,
    after FullyShardedDataParallel inside its summon_full_params.

    Args:
        model: a model with this adapter.
        folder: made if it does not exist.
        adapter_name: which; its name is not written.
    Raises:
        AdapterError: if there is no such adapter.
        CheckpointError: if the adapter has no values yet (meta device) or only a process's share of them, or the folder
            is a file.
    Source: PEFT's checkpoint format; Meng et al. 2024 (arXiv 2404.02948), appendix C, for the plain form of PiSSA.
    """
    model = unwrapped(model)
    require_adapters(model, [adapter_name])
    config = adapter_config(model, adapter_name)
    tensors = _whole(model, adapter_name, adapter_tensors(model, adapter_name, config))
    tensors, config = _plain_lora(model, adapter_name, tensors, config)
    config = resolved(model, adapter_name, config)
    warn_where_peft_differs(model, adapter_name)
    values = _with_base_name(model, config_to_peft(config))
    write_checkpoint(folder_path(folder), values, _on_cpu(tensors))


def _whole(model: nn.Module, adapter_name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return an adapter's tensors, those that are shared out among processes with all their values."""
    found = dict(tensors)
    for name, layer in layers_of(model, adapter_name).items():
        wanted = layer.pair_shapes(layer.adapters[adapter_name].rank)
        for part, shape in zip((layer.PEFT_A, layer.PEFT_B), wanted, strict=True):
            place = key(name, part)
            if found[place].shape != shape:
                raise CheckpointError(
                    f"cannot save {adapter_name!r}: {place} is {tuple(found[place].shape)} here, a share of "
                    f"{tuple(shape)}: save inside FullyShardedDataParallel.summon_full_params(model)"
                )
    for name, tensor in found.items():
        if tensor.is_meta:
            raise CheckpointError(
                f"cannot save {adapter_name!r}: {name} is on the meta device and has no values; load or initialise the "
                "model first, or take accelerate's hooks off, which keep them elsewhere"
            )
        gather = getattr(tensor, "full_tensor", None)
        # a DTensor, of which every process holds a part
        found[name] = tensor if gather is None else gather()
    return found


def adapter_config(model: nn.Module, adapter_name: str) -> LoraConfig:
    """Return the configuration an adapter was made from."""
    holder = next(part for part in parts(model).values() if adapter_name in part.adapters)
    config: LoraConfig = holder.adapters[adapter_name].config
    return config


def _plain_lora(
    model: nn.Module, adapter_name: str, tensors: dict[str, Tensor], config: LoraConfig
) -> tuple[dict[str, Tensor], LoraConfig]:
    """Return an adapter for the base weight as it was before the start took a part out of it."""
    layers = layers_of(model, adapter_name)
    if not any(adapter_name in layer.lora_start for layer in layers.values()):
        return tensors, config
    if any(isinstance(layer, LoraNF4Linear) for layer in layers.values()):
        warn(
            f"adapter {adapter_name!r} started from 4-bit weights, of which what was left was quantised anew; it is "
            "saved for the original ones, with which it computes the same up to that rounding"
        )
    tensors = dict(tensors)
    for name, layer in layers.items():
        start = layer.start_of(adapter_name)
        a, b = (tensors[key(name, part)].detach() for part in (layer.PEFT_A, layer.PEFT_B))
        start_a, start_b = start[0].to(a), start[1].to(b)
        tensors[key(name, layer.PEFT_A)] = torch.cat([a, start_a], dim=0)
        tensors[key(name, layer.PEFT_B)] = torch.cat([b, -start_b], dim=1)
    # s is alpha / r, or alpha / sqrt r: so that it stays as it is
    growth = math.sqrt(2) if config.use_rslora else 2
    doubled = dataclasses.replace(
        config,
        r=2 * config.r,
        lora_alpha=growth * config.lora_alpha,
        rank_pattern={k: 2 * v for k, v in config.rank_pattern.items()},
        alpha_pattern={k: growth * v for k, v in config.alpha_pattern.items()},
        # "pissa" would have PEFT decompose the base weight again on loading
        init_lora_weights=True,
    )
    return tensors, doubled


def _with_base_name(model: nn.Module, values: dict[str, Any]) -> dict[str, Any]:
    """Add the name of the base model, if it knows it."""
    name = getattr(model, "name_or_path", None)
    if not values.get("base_model_name_or_path"):
        values["base_model_name_or_path"] = name if isinstance(name, str) and name else None
    return values


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as a file takes them: contiguous, in CPU memory, each in its own."""
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu").contiguous()
        pointer = plain.untyped_storage().data_ptr()
        found[name] = plain.clone() if pointer in seen else plain
        seen.add(pointer)
    return found
