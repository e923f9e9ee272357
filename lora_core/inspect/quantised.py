"""Weights in bitsandbytes' 4-bit format, recognised by the JSON that stands beside each."""

import json
import math
from typing import Any

from lora_core.inspect.files import Tensors
from lora_core.inspect.report import Quantised, Report

STATE = ".quant_state.bitsandbytes__"
PARTS = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


def describe_quantised(report: Report, tensors: Tensors) -> set[str]:
    """Add the quantised weights to report; return the names of the tensors they consist of.

    Args:
        report: changed in place.
        tensors: of the checkpoint.
    """
    used: set[str] = set()
    for name in tensors.names():
        weight, found, _ = name.partition(STATE)
        if not found:
            continue
        parts = {weight + part for part in PARTS if weight + part in tensors}
        used |= {name, *parts}
        state = _state(tensors, name)
        if state is None:
            report.problems.append(f"{name} holds no JSON of a quantised weight: the file is damaged, save it again")
            continue
        report.quantised.append(_weight(report, tensors, weight, state))
    return used


def _state(tensors: Tensors, name: str) -> dict[str, Any] | None:
    try:
        values = json.loads(bytes(tensors.read(name).tolist()).decode("utf-8"))
        wanted = {"quant_type", "blocksize", "dtype", "shape"}
        return values if isinstance(values, dict) and wanted <= set(values) else None
    except (ValueError, TypeError):
        return None


def _weight(report: Report, tensors: Tensors, name: str, state: dict[str, Any]) -> Quantised:
    shape = tuple(int(n) for n in state["shape"])
    count, block = math.prod(shape), int(state["blocksize"])
    nested = f"{name}.nested_absmax" in tensors
    wanted = {"": (count + 1) // 2, ".absmax": math.ceil(count / block)}
    if nested:
        wanted[".nested_absmax"] = math.ceil(wanted[".absmax"] / int(state.get("nested_blocksize", 256)))
    size = 0
    for part, elements in wanted.items():
        if name + part not in tensors:
            report.problems.append(f"{name}{part} is missing: the weight cannot be read; save the checkpoint again")
            continue
        got = math.prod(tensors.shape(name + part))
        if got != elements:
            report.problems.append(
                f"{name}{part} has {got} elements, a weight of shape {list(shape)} in blocks of {block} has {elements}"
            )
        size += got * (4 if tensors.dtype(name + part) == "float32" else 1)
    # bytes kept as floats change where they spell a NaN
    if name in tensors and tensors.dtype(name) != "uint8":
        report.problems.append(f"{name} is stored as {tensors.dtype(name)}, which changes packed bytes; want uint8")
    return Quantised(
        name=name,
        quant_type=str(state["quant_type"]),
        shape=shape,
        dtype=str(state["dtype"]),
        block_size=block,
        double_quant=nested,
        bits_per_parameter=8 * size / count if count else 0.0,
    )
