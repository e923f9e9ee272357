"""Adapters written for an inspection, and the program's exit status for it."""

import json

import torch
from safetensors.torch import save_file

from lora_core.adapt.files import CONFIG, WEIGHTS
from lora_core.cli import main

CONFIGURATION = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["up", "down"], "bias": "none"}


def write_adapter(folder, config=CONFIGURATION, metadata=None, **changes):
    """Write a trained adapter for two layers, 16 -> 24 and 24 -> 16, with some tensors changed or (None) left out."""
    tensors = {
        "base_model.model.up.lora_A.weight": torch.randn(4, 16),
        "base_model.model.up.lora_B.weight": torch.randn(24, 4),
        "base_model.model.down.lora_A.weight": torch.randn(4, 24),
        "base_model.model.down.lora_B.weight": torch.randn(16, 4),
    }
    tensors.update({f"base_model.model.{k.replace('__', '.')}.weight": v for k, v in changes.items()})
    folder.mkdir(exist_ok=True)
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / WEIGHTS, metadata=metadata)
    if config is not None:
        (folder / CONFIG).write_text(json.dumps(config))
    return tensors


def exit_status(*arguments):
    """The program's exit status for these arguments."""
    try:
        main([*arguments])
    except SystemExit as stop:
        return stop.code
    return 0
