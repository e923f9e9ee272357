"""LoRA and QLoRA in readable PyTorch, with fast paths tested against it."""

from pathlib import Path

# a wheel holds kernels/ and quant/ inside this folder; a source checkout holds them beside it
_here = Path(__file__).resolve().parent
if not (_here / "quant").is_dir():
    __path__.append(str(_here.parent))

__version__ = "0.1.0"

from lora_core import backends  # noqa: E402
from lora_core.adapt.count import print_trainable_parameters  # noqa: E402
from lora_core.adapt.delete import delete_adapter  # noqa: E402
from lora_core.adapt.disable import disable_adapter  # noqa: E402
from lora_core.adapt.fuse import FuseReport, fuse, unfuse  # noqa: E402
from lora_core.adapt.inject import add_adapter  # noqa: E402
from lora_core.adapt.load import load_adapter  # noqa: E402
from lora_core.adapt.merge import merge_adapter, merge_and_unload, unmerge_adapter  # noqa: E402
from lora_core.adapt.quantize import quantize_model  # noqa: E402
from lora_core.adapt.save import save_adapter  # noqa: E402
from lora_core.adapt.switch import set_adapter  # noqa: E402
from lora_core.errors import (  # noqa: E402
    AdapterError,
    CheckpointError,
    ConfigError,
    DeviceError,
    DtypeError,
    LoraCoreError,
    NonFiniteError,
    ShapeError,
    TargetNotFoundError,
)
from lora_core.methods.lora import LoraConfig  # noqa: E402
from lora_core.methods.nf4 import NF4Config  # noqa: E402
from lora_core.ops.lora_linear import lora_linear  # noqa: E402
from lora_core.ops.nf4_lora_linear import nf4_lora_linear  # noqa: E402
from lora_core.quant import QuantizedWeight, quantize_nf4  # noqa: E402

__all__ = [
    "AdapterError",
    "CheckpointError",
    "ConfigError",
    "DeviceError",
    "DtypeError",
    "FuseReport",
    "LoraConfig",
    "LoraCoreError",
    "NF4Config",
    "NonFiniteError",
    "QuantizedWeight",
    "ShapeError",
    "TargetNotFoundError",
    "add_adapter",
    "delete_adapter",
    "disable_adapter",
    "fuse",
    "load_adapter",
    "lora_linear",
    "merge_adapter",
    "merge_and_unload",
    "nf4_lora_linear",
    "print_trainable_parameters",
    "quantize_model",
    "quantize_nf4",
    "save_adapter",
    "set_adapter",
    "unfuse",
    "unmerge_adapter",
]

backends.load()
