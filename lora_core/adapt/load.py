"""load_adapter: read an adapter that save_adapter or PEFT wrote."""

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_core.adapt.configuration import config_from_peft
from lora_core.adapt.files import WEIGHTS, folder_path
from lora_core.adapt.finite import is_finite
from lora_core.adapt.inject import injected, take_starts
from lora_core.adapt.keys import adapter_tensors, base_tensors
from lora_core.adapt.modules_to_save import saves
from lora_core.adapt.peft_differs import warn_where_peft_differs
from lora_core.adapt.place import check_fit, check_ranks, placed
from lora_core.adapt.read_files import read_checkpoint
from lora_core.adapt.switch import set_adapter
from lora_core.adapt.walk import layers_of, plain_name, refuse_wrapped, unwrapped
from lora_core.adapt.warn import warn
from lora_core.methods.lora import LoraConfig
from lora_core.methods.start import initialise, starts_from_weight


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter_name: str = "default",
    is_trainable: bool = False,
    *,
    autocast_adapter_dtype: bool = True,
) -> nn.Module:
    """Read an adapter into a model and run it.

    Every tensor of the file has to have its place and every place its tensor. Biases trained with bias="all" or
    "lora_only", and weights of the embeddings if PEFT saved them, are written into the base layers, as PEFT does.

    Args:
        model: the base model, with or without other adapters; changed in place.
        folder: holds adapter_config.json and adapter_model.safetensors.
        adapter_name: a name without dots, new to this model.
        is_trainable: make exactly the adapter trainable; else everything is frozen.
        autocast_adapter_dtype: keep A and B in float32 over a half-precision base, as PEFT does.
    Returns:
        model.
    Raises:
        CheckpointError: if a file is missing, truncated or foreign, or does not fit the model, with the differences;
            if the model is on the meta device. The model is left as it was.
        ConfigError: if the configuration asks for what is not implemented.
        TargetNotFoundError: if no module matches.
        AdapterError: if the name is taken, an adapter is merged, adapters are disabled for a while, PEFT has put
            adapters into the model, another adapter has trained biases too, or it is to be trained and processes are
            synchronised already (DDP, FSDP).
    Source: PEFT's checkpoint format.
    """
    inner = unwrapped(model)
    if is_trainable:
        refuse_wrapped(model, f"load adapter {adapter_name!r} to train it")
    checkpoint = read_checkpoint(folder_path(folder))
    config = _without_absent(inner, config_from_peft(checkpoint.config))
    check_ranks(Path(folder), checkpoint.tensors, config)
    with injected(
        inner,
        config,
        adapter_name,
        initialise_pairs=False,
        trainable=is_trainable,
        autocast_adapter_dtype=autocast_adapter_dtype,
    ):
        own = adapter_tensors(inner, adapter_name, config)
        base = base_tensors(inner, config)
        given = placed(checkpoint.tensors, {**base, **own})
        check_fit(Path(folder), given, own, base, config)
        _warn_of_broken(Path(folder), given)
        warn_where_peft_differs(inner, adapter_name)
        changed = _changed_base({name: slot for name, slot in base.items() if name not in own}, given)
        # it warns first: where warnings are errors, nothing of the base model's has been written until here
        _restart(inner, adapter_name, config)
        # the base model's own: biases that the adapter trains, and weights that PEFT has saved with it
        of_base = [*changed.values(), *(slot for name, slot in own.items() if name.endswith("bias"))]
        with _unchanged_on_failure(of_base):
            _fill(own, given)
            _fill(changed, given)
            set_adapter(inner, adapter_name)
    return model


def _without_absent(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """Drop modules_to_save that the model lacks: PEFT lists every name a classifier's head may have.

    Nothing gets lost unseen: tensors of such a module would be found to have no place.
    """
    if not config.modules_to_save:
        return config
    names = [plain_name(n) for n, _ in model.named_modules()]
    present = [m for m in config.modules_to_save if any(saves(n, [m]) for n in names)]
    return dataclasses.replace(config, modules_to_save=present or None)


def _warn_of_broken(folder: Path, given: dict[str, Tensor]) -> None:
    broken = [name for name, tensor in given.items() if not is_finite(tensor)]
    if broken:
        warn(
            f"{folder / WEIGHTS} holds NaN or infinity in {len(broken)} tensors, the first {broken[0]}: its training "
            "diverged, or the file is damaged"
        )


def _restart(model: nn.Module, adapter_name: str, config: LoraConfig) -> None:
    """Repeat a start that changed the base weight: the file's A and B belong to what it left of it, as PEFT has it."""
    start = config.init_lora_weights
    if not starts_from_weight(start):
        return
    if start not in ("pissa", "olora"):
        warn(
            f"this adapter was started with {start!r} and not converted to a plain one: its random decomposition of "
            "the base weight is repeated here only approximately; save it as plain LoRA where it was trained"
        )
    for layer in layers_of(model, adapter_name).values():
        initialise(layer, adapter_name, start)
    take_starts(model, adapter_name)


@contextlib.contextmanager
def _unchanged_on_failure(slots: Iterable[Tensor]) -> Iterator[None]:
    """Put these tensors back as they are now where what is done inside does not come to its end."""
    kept = [(slot, slot.detach().clone()) for slot in slots]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for slot, value in kept:
                slot.copy_(value)
        raise


@torch.no_grad()
def _fill(slots: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    for name, slot in slots.items():
        slot.copy_(given[name])


def _changed_base(base: dict[str, Tensor | None], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the base model's tensors from which those that PEFT saved with the adapter differ, and say so."""
    held = {name: slot for name, slot in base.items() if slot is not None and name in given}
    changed = {name: slot for name, slot in held.items() if not torch.equal(given[name].to(slot), slot)}
    if changed:
        warn(
            f"the checkpoint holds base weights that differ from the model's, and they are written into it: "
            f"{', '.join(changed)}"
        )
    return changed
