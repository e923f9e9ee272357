"""Write data.js, the library's numbers that the pages start from: `python docs/interactive/generate.py`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lora_core.plan.catalogue import SHAPES
from lora_core.plan.roofline import GPUS
from lora_core.plan.shape import ModelShape
from lora_core.quant.codebook import codebook

FILE = Path(__file__).resolve().parent / "data.js"
CODEBOOKS = ("nf4", "fp4", "int4")


def main() -> None:
    """Write the file."""
    FILE.write_text(text(), encoding="utf-8")
    print(FILE)


def text() -> str:
    """Return what the file is to hold."""
    data = {
        "models": [model(shape) for shape in SHAPES],
        "codebooks": {name: book(name) for name in CODEBOOKS},
        "gpus": [asdict(gpu) for gpu in GPUS],
    }
    lines = ",\n".join(f'  "{name}": {json.dumps(part)}' for name, part in data.items())
    head = '"use strict";\n// Written by generate.py from lora_core.plan and lora_core.quant.\n'
    return f"{head}const DATA = {{\n{lines}\n}};\n"


def model(shape: ModelShape) -> dict[str, Any]:
    """Return the sizes of a model that its plan is made of."""
    fields = ("name", "layers", "hidden", "intermediate", "heads", "vocabulary", "gated", "tied", "biases", "positions")
    derived = ("query_width", "kv_width", "parameters", "linear_weights")
    linears = [asdict(layer) for layer in shape.linears]
    return {name: getattr(shape, name) for name in (*fields, *derived)} | {"linears": linears}


def book(name: str) -> dict[str, Any]:
    """Return a codebook's levels from the lowest, its magnitudes where it has a sign bit, and what separates them."""
    found = codebook(name)
    levels = found.levels[:8] if found.sign_bit else found.levels
    order = torch.argsort(levels)
    return {
        "levels": levels[order].tolist(),
        "codes": order.tolist(),
        "midpoints": found.midpoints.tolist(),
        "signed": bool(found.sign_bit),
    }


if __name__ == "__main__":
    main()
