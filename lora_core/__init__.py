"""LoRA and QLoRA in readable PyTorch, with fast paths proven against it."""

from pathlib import Path

# a wheel holds kernels/ and quant/ inside this folder; a source checkout holds them beside it
_here = Path(__file__).resolve().parent
if not (_here / "quant").is_dir():
    __path__.append(str(_here.parent))

__version__ = "0.1.0"
