"""The pre-trained base: reading it and building fresh models from it."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.adapt.quantize import quantize_model
from lora_core.demo.model import GPT, GPTConfig
from lora_core.demo.tokenizer import Tokenizer
from lora_core.errors import CheckpointError
from lora_core.layers.nf4_linear import NF4Linear
from lora_core.methods.nf4 import NF4Config

SHIPPED = Path(__file__).parent
# what a run reports of the base, and its kinds
RECORD: dict[str, tuple[type, ...]] = {
    "parameters": (int,),
    "steps": (int,),
    "held_out_nats_per_byte": (float, int),
    "prose_sha256": (str,),
}
# QLoRA's own setting (Dettmers et al. 2023, section 3)
QLORA = NF4Config(block_size=64, double_quant=True)


@dataclass(frozen=True)
class Base:
    """What base.safetensors, base.json and tokenizer.json hold."""

    state: dict[str, Tensor]
    config: GPTConfig
    tokenizer: Tokenizer
    record: dict[str, Any]
    file_bytes: int

    def model(self) -> GPT:
        """A fresh float32 copy without dropout: adaptation sees less than one epoch of its text."""
        model = GPT(replace(self.config, dropout=0.0))
        model.load_state_dict(self.state)
        return model

    def quantized(self) -> nn.Module:
        """A fresh copy with its linear layers in NF4 with double quantisation."""
        return quantize_model(self.model(), QLORA)

    def dequantized(self) -> GPT:
        """A fresh float32 copy whose linear layers hold the values that NF4 stands for."""
        model, rounded = self.model(), self.quantized()
        with torch.no_grad():
            for name, module in rounded.named_modules():
                if isinstance(module, NF4Linear):
                    model.get_parameter(f"{name}.weight").copy_(module.weight.dequantize(torch.float32))
        return model


def load_base(folder: Path = SHIPPED) -> Base:
    """Reads a base that `lora-core demo --pretrain` wrote.

    Args:
        folder: holds base.safetensors and tokenizer.json.
    Raises:
        CheckpointError: if a file is missing, truncated, of another shape or not finite, or its record lacks a field.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / "base.safetensors"
    try:
        with safe_open(path, "pt") as file:
            record = json.loads((file.metadata() or {})["record"])
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        config = GPTConfig(**record["config"])
        base = Base(state, config, Tokenizer.load(folder / "tokenizer.json"), record, path.stat().st_size)
        base.model()
    except CheckpointError:
        raise
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} cannot be read as the demo's base ({type(error).__name__}: {error}); want the file shipped with "
            "the package, or one made by: lora-core demo --pretrain --output FOLDER, then --base FOLDER"
        ) from error
    if len(base.tokenizer) != config.vocabulary:
        raise CheckpointError(
            f"{folder} holds a tokenizer of {len(base.tokenizer)} tokens and a model of {config.vocabulary}; want the "
            "three files of one pre-training run"
        )
    _check_values(path, base)
    return base


def _check_values(path: Path, base: Base) -> None:
    """Raises CheckpointError where a run would fail on the base after all its training."""
    for name, kinds in RECORD.items():
        value = base.record.get(name)
        if not isinstance(value, kinds) or (isinstance(value, float) and not math.isfinite(value)):
            raise CheckpointError(
                f"the record in {path} has {name} = {value!r}, which a run reports; want a file that --pretrain wrote"
            )
    for name, tensor in base.state.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{name} in {path} holds NaN or infinity; want a base whose training did not diverge")
