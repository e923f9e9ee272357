"""Counting a learner's kernel: `python -m lora_core.puzzles.count FILE ARCH` prints a JSON line.

A process of its own, without TRITON_INTERPRET: a kernel is either interpreted or compiled in one.
"""

import importlib
import json
import sys

from lora_core.kernels.variant import Variant
from lora_core.puzzles.load import load


def main(file: str, arch: str) -> None:
    """Compile the file's dequantize_kernel; print instructions a weight, global accesses and spilled bytes."""
    module = load(file)
    variant = Variant(
        name="yours",
        kernel=module.dequantize_kernel,
        signature={
            "words_ptr": "*i32", "absmax_ptr": "*fp32", "levels_ptr": "*fp32", "w_ptr": "*bf16", "words": "i32",
        },
        constants={"BLOCK_SIZE": 64, "WORDS": module.WORDS},
        options={"num_warps": module.WARPS},
        weights=8 * module.WORDS,
    )  # fmt: skip
    # the benchmarks are no part of the package
    row = importlib.import_module("benchmarks.codegen").compile_variant("yours", variant, int(arch))
    print(json.dumps({"per_element": row.per_element, "accesses": row.accesses, "spilled": row.spill_bytes}))


if __name__ == "__main__":
    main(*sys.argv[1:])
