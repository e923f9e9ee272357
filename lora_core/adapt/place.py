"""Which tensor of a file belongs where in a model, and whether they fit."""

import difflib
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from lora_core.adapt.files import WEIGHTS
from lora_core.adapt.keys import PREFIX, canonical, other_tool
from lora_core.adapt.modules_to_save import lies_in_saved
from lora_core.errors import CheckpointError
from lora_core.layers.adapter import AdapterLayer
from lora_core.layers.embedding import LoraEmbedding
from lora_core.methods.lora import LoraConfig

# How many names of each kind a message lists.
SHOWN = 8

ENDINGS_OF_A = (f".{AdapterLayer.PEFT_A}", f".{LoraEmbedding.PEFT_A}")
ENDINGS = (*ENDINGS_OF_A, f".{AdapterLayer.PEFT_B}", f".{LoraEmbedding.PEFT_B}")

WANTED = "Want the base model this adapter was made for, and its own adapter_config.json"


def placed(tensors: dict[str, Tensor], places: Collection[str]) -> dict[str, Tensor]:
    """Return a file's tensors by the places that are theirs: of this name, or else of this canonical one.

    A model may itself have modules called lora_A, original_module or base_layer: names that it has come first.

    Raises:
        CheckpointError: if two different tensors belong in one place, or one cannot be computed with.
    """
    found = {name: _computable(name, tensor) for name, tensor in tensors.items() if name in places}
    free = {str(canonical(name)): name for name in places if name not in found}
    for name, tensor in tensors.items():
        short = canonical(name)
        if name in found or short is None:
            continue
        place = free.get(short, short)
        computable = _computable(name, tensor)
        if place in found and not torch.equal(found[place], computable):
            raise CheckpointError(
                f"{WEIGHTS} holds two different tensors for {place}, one of them as {name}: want one adapter in a file"
            )
        found[place] = computable
    return found


def _computable(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor in a dtype that all operations know: not every one knows the floats of 8 bits and fewer."""
    if not tensor.is_floating_point() or tensor.itemsize > 1:
        return tensor
    try:
        return tensor.float()
    except NotImplementedError:
        raise CheckpointError(
            f"{WEIGHTS} holds {name} as {tensor.dtype}, which PyTorch cannot turn into other floats: want float32, "
            "float16, bfloat16 or float8; save it again in one of them"
        ) from None


def check_ranks(folder: Path, tensors: dict[str, Tensor], config: LoraConfig) -> None:
    """Raise CheckpointError where A in the file is of another rank than configured, before memory is taken for one."""
    wrong = []
    for name, tensor in tensors.items():
        plain = name if name.endswith(ENDINGS) else str(canonical(name))
        ending = next((ending for ending in ENDINGS_OF_A if plain.endswith(ending)), None)
        if ending is None or lies_in_saved(name.removeprefix(PREFIX), config):
            continue
        rank = config.rank_of(plain.removesuffix(ending).removeprefix(PREFIX))
        if tensor.shape[:1] != (rank,):
            wrong.append(f"{plain}: {_describe(tensor)} in the file, rank {rank} in the configuration")
    if wrong:
        raise CheckpointError(
            f"{folder / WEIGHTS} does not fit its configuration."
            + _listed("of another rank", wrong)
            + f"\n{WANTED}; the model is unchanged"
        )


def check_fit(
    folder: Path,
    given: dict[str, Tensor],
    own: dict[str, Tensor],
    base: dict[str, Tensor | None],
    config: LoraConfig,
) -> None:
    """Raise CheckpointError unless each tensor has a place, each place a tensor, and all shapes agree."""
    unreal = next((name for name, slot in own.items() if slot.is_meta), None)
    if unreal:
        raise CheckpointError(
            f"cannot load an adapter into a model on the meta device ({unreal} would have no values): load the base "
            "weights first"
        )
    missing = [name for name in own if name not in given]
    places = {**base, **own}
    unexpected = [name for name in given if name not in places]
    fitting = {name: slot for name, slot in places.items() if slot is not None and name in given}
    wrong = [
        f"{name}: {_describe(given[name])} in the file, {_describe(slot)} in the model"
        for name, slot in fitting.items()
        if given[name].shape != slot.shape or given[name].is_floating_point() != slot.is_floating_point()
    ]
    if missing or unexpected or wrong:
        near = [_nearest(name, missing) for name in unexpected]
        raise CheckpointError(
            f"{folder / WEIGHTS} does not fit the model."
            + _listed("missing in the file", missing)
            + _listed("unexpected in the file", [n + h for n, h in zip(unexpected, near, strict=True)])
            + _listed("of the wrong shape or type", wrong)
            + f"\n{_advice(missing, unexpected, config)}; the model is unchanged"
        )


def _advice(missing: list[str], unexpected: list[str], config: LoraConfig) -> str:
    if config.bias == "lora_only" and missing and all(name.endswith(".bias") for name in missing):
        return "PEFT has not always saved the biases of bias='lora_only': 'none' in adapter_config.json loads the rest"
    return other_tool(unexpected) or WANTED


def _describe(tensor: Tensor) -> str:
    kind = "" if tensor.is_floating_point() else f" {tensor.dtype}".replace("torch.", "")
    return f"{list(tensor.shape)}{kind}"


def _nearest(name: str, missing: list[str]) -> str:
    near = difflib.get_close_matches(name, missing[: 10 * SHOWN], n=1, cutoff=0.9)
    return f" (is it {near[0]}?)" if near else ""


def _listed(title: str, lines: list[str]) -> str:
    if not lines:
        return ""
    more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n    ".join([f"\n  {title} ({len(lines)}):", *lines[:SHOWN], *more])
