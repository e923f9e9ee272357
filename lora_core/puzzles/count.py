"""Counting a learner's kernel: `python -m lora_core.puzzles.count FILE ARCH` prints a JSON line.

A process of its own, without TRITON_INTERPRET: a kernel is either interpreted or compiled in one.
"""

import importlib
import json
import re
import sys

from lora_core.kernels.form import Form
from lora_core.kernels.variant import Variant
from lora_core.puzzles.load import load


def main(file: str, arch: str) -> None:
    """Compile the file's dequantize_kernel; print instructions a weight, global accesses, loops and spilled bytes."""
    module = load(file)
    pointers = {"words_ptr": "*i32", "absmax_ptr": "*fp32", "levels_ptr": "*fp32", "w_ptr": "*bf16"}
    variant = Variant(
        name="yours",
        form=Form(module.dequantize_kernel, addresses=tuple(pointers)),
        types=pointers,
        constants={"BLOCK_SIZE": 64, "WORDS": module.WORDS},
        options={"num_warps": module.WARPS},
        weights=8 * module.WORDS,
    )
    # the benchmarks are no part of the package
    codegen, machine_code = (importlib.import_module(f"benchmarks.{name}") for name in ("codegen", "machine_code"))
    built = codegen.build(variant, int(arch))
    (text,) = machine_code.listings([built.asm["cubin"]], int(arch))
    row = codegen.counted("yours", variant, built, text, int(arch))
    found = {"per_element": row.per_element, "accesses": row.accesses, "spilled": row.spill_bytes}
    print(json.dumps(found | {"loops": loops(built.asm["ptx"])}))


def loops(ptx: str) -> int:
    """Return how many branches of a kernel's intermediate code lead back to a label before them."""
    seen: set[str] = set()
    count = 0
    for line in ptx.splitlines():
        label = re.match(r"\s*(\$\w+):", line)
        if label:
            seen.add(label.group(1))
        target = re.search(r"\bbra(?:\.\w+)?\s+(\$\w+)", line)
        count += target is not None and target.group(1) in seen
    return count


if __name__ == "__main__":
    main(*sys.argv[1:])
