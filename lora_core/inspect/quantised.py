"""Weights in bitsandbytes' 4-bit format: each is read as a loader reads it, so what cannot be loaded is a problem."""

import math
import re

from lora_core.adapt.finite import is_finite
from lora_core.errors import LoraCoreError
from lora_core.inspect.files import Tensors
from lora_core.inspect.report import Quantised, Report
from lora_core.quant import QuantizedWeight

# what stands beside the packed codes; any of the first two is the mark of such a weight
MARK = re.compile(r"\.(quant_state\.(bitsandbytes|lora_core)__\w+|quant_map)$")
SCALES = (".absmax", ".nested_absmax")
PARTS = (*SCALES, ".quant_map", ".nested_quant_map")
# where a weight that is no layer's keeps its codes
PACKED = ".packed"


def describe_quantised(report: Report, tensors: Tensors) -> set[str]:
    """Add the quantised weights to report; return the names of the tensors they consist of.

    Args:
        report: changed in place.
        tensors: of the checkpoint.
    """
    beside: dict[str, set[str]] = {}
    for name in tensors.names():
        mark = MARK.search(name)
        if mark:
            beside.setdefault(name[: mark.start()], set()).add(name)
    used: set[str] = set()
    for weight, marks in beside.items():
        codes = weight if weight in tensors else weight + PACKED
        parts = {codes, *marks, *(weight + part for part in PARTS)} & set(tensors.names())
        used |= parts
        found = _weight(report, tensors, weight, codes, parts)
        if found is not None:
            report.quantised.append(found)
    return used


def _weight(report: Report, tensors: Tensors, name: str, codes: str, parts: set[str]) -> Quantised | None:
    state = {name if part == codes else part: tensors.read(part) for part in parts}
    try:
        weight = QuantizedWeight.from_bitsandbytes(state, name)
    except LoraCoreError as error:
        report.problems.append(str(error))
        return None
    if not is_finite(weight.dense_absmax()):
        report.problems.append(f"{name}: a scale is NaN or infinite, and so are its weights; quantise the model again")
    size = sum(state[part].nbytes for part in (name, *(name + scale for scale in SCALES)) if part in state)
    count = math.prod(weight.shape)
    return Quantised(
        name=name,
        quant_type=weight.quant_type,
        shape=tuple(weight.shape),
        dtype=str(weight.dtype).removeprefix("torch."),
        block_size=weight.block_size,
        double_quant=f"{name}.nested_absmax" in state,
        bits_per_parameter=8 * size / count if count else 0.0,
    )
