"""Quantised weights of formats that are not read here: named, as their tensors alone say nothing to most people.

By the names of their tensors: GPTQ's and AWQ's loaders look for qweight, compressed-tensors' for weight_packed,
transformers' for weight_scale_inv (block-wise fp8) and bitsandbytes' for SCB beside a weight in int8.
"""

from lora_core.inspect.files import Tensors
from lora_core.inspect.report import Report

GPTQ_OR_AWQ = ".qweight"
FORMATS = {
    GPTQ_OR_AWQ: "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "block-wise fp8",
    ".SCB": "bitsandbytes' LLM.int8()",
}
# codes of four bits in one int32
PER_WORD = 8


def note_foreign(report: Report, tensors: Tensors) -> None:
    """Add a note for each foreign format of which there are weights.

    Args:
        report: changed in place.
        tensors: of the checkpoint.
    """
    found: dict[str, list[str]] = {}
    for name in tensors.names():
        mark = next((suffix for suffix in FORMATS if name.endswith(suffix)), None)
        if mark:
            kind = _gptq_or_awq(tensors, name) if mark == GPTQ_OR_AWQ else FORMATS[mark]
            found.setdefault(kind, []).append(name)
    for kind, names in found.items():
        count = f"{len(names)} weight{'s' * (len(names) > 1)}"
        report.notes.append(
            f"{count} quantised by {kind}, such as {names[0]}: listed as stored, and not loaded by this library, which "
            "reads bitsandbytes' 4-bit format; start from the model before it was quantised"
        )


def _gptq_or_awq(tensors: Tensors, codes: str) -> str:
    """Tell the two apart: GPTQ packs eight rows of codes in a word, [K / 8, N], AWQ eight columns, [K, N / 8]."""
    scales = codes.removesuffix(GPTQ_OR_AWQ) + ".scales"
    shapes = [tensors.shape(name) for name in (codes, scales) if name in tensors]
    if len(shapes) == 2 and all(len(shape) == 2 for shape in shapes):
        (_, packed), (_, columns) = shapes
        if packed == columns:
            return "GPTQ"
        if packed * PER_WORD == columns:
            return "AWQ"
    return FORMATS[GPTQ_OR_AWQ]
