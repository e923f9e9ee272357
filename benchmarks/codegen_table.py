"""Write what the compiler makes of the kernels into kernels/README.md: `python -m benchmarks.codegen_table`.

A row for each configuration of the sample and each architecture, between two markers; all else in the file is written
by hand. Needs no GPU; must run without TRITON_INTERPRET.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.codegen import ARCHITECTURES, KERNELS, Compiled, compile_variants, variants_of
from benchmarks.markers import rewrite, row

README = KERNELS / "README.md"
COMMAND = "python -m benchmarks.codegen_table"

# configurations of each kernel that stand for the rest, the most used one first
SAMPLE = {
    "absmax_dequantize": ("blocks of 256",),
    "absmax_quantize": ("blocks of 256",),
    "dora_norm": ("bf16 bf16 rank 16 dense", "bf16 bf16 rank 64 words nested"),
    "gather_expand": ("bf16 bf16 scaled base transposed", "fp16 fp32 loose"),
    "gather_gradient": ("bf16 bf16 rank 64 scaled transposed", "fp16 fp32 rank 16 loose"),
    "gather_shrink": ("bf16 bf16 rank 16 scaled transposed", "bf16 bf16 rank 64 loose"),
    "low_rank_matmul": (
        "bf16 bf16 128x128x64 rank 16",
        "fp16 fp16 64x64x64 rank 32 transposed",
        "bf16 fp32 128x128x64 rank 16",
        "fp32 fp32 16x64x32 rank 16 added",
        "bf16 bf16 32x64x32 rank 16 odd",
        "bf16 bf16 32x64x32 rank 16 strided",
    ),
    "nf4_columns": ("bf16 nested blocks", "fp16 nested words", "fp32 plain elements"),
    "nf4_dequantize": ("bf16 64 nested words", "fp16 64 plain bytes", "fp32 4096 nested words"),
    "nf4_matmul": (
        "bf16 bf16 16 nested words forward",
        "bf16 bf16 64 nested words transposed",
        "fp32 fp32 16 nested elements forward",
    ),
    "nf4_quantize": ("bf16 64 words", "fp32 4096 bytes"),
    "rms_norm": ("bf16 4096", "bf16 4096 backward weight", "fp32 8192 of more", "fp16 1024 backward loose"),
    "rotary": ("bf16 64", "bf16 64 backward", "fp32 32 loose"),
    "row_sum": (
        "bf16 bf16 rank 16 bias hidden split",
        "bf16 fp32 rank 16 transposed dropout",
        "fp16 fp16 rank 16 narrow",
    ),
    "shrink": (
        "bf16 bf16 64x16 dropout",
        "fp16 fp16 16x64 split",
        "fp32 fp32 64x16",
        "bf16 bf16 64x16 transposed split",
        "bf16 bf16 32x64 loose dropout",
    ),
    "split_sum": ("bf16 added",),
    "swiglu": ("bf16", "bf16 backward", "fp32 odd"),
}
# the matrix instructions of each architecture, by the first word of their names
MATRIX = ("HGMMA", "HMMA", "UTCHMMA")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile the sample and rewrite the table."""
    import triton

    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.splitlines()[0])
    parser.add_argument("--readme", type=Path, default=README, help="the file whose table is written")
    readme = parser.parse_args(arguments).readme
    rows = []
    for kernel, names in SAMPLE.items():
        known = {variant.name: variant for variant in variants_of(kernel)}
        by_arch = [compile_variants(kernel, [known[name] for name in names], arch) for arch in ARCHITECTURES]
        rows += [row for of_one in zip(*by_arch, strict=True) for row in of_one]
    rewrite(readme, COMMAND, table(rows, triton.__version__))
    return 0


def table(rows: Iterable[Compiled], triton_version: str) -> str:
    """Return the rows as a Markdown table that says which compiler made them."""
    head = ("kernel", "configuration", "sm", "registers", "spilled bytes", "shared KiB", "instructions")
    head += ("per element", "matrix", "16-byte loads", "16-byte stores")
    lines = [f"Compiled by Triton {triton_version}.", "", row([*head]), row(["---"] * len(head))]
    return "\n".join([*lines, *(row(_cells(found)) for found in rows)])


def _cells(row: Compiled) -> list[str]:
    matrix = [f"{row.instructions[name]} {name}" for name in MATRIX if name in row.instructions]
    loads = sum(row.accesses.get(f"{name}.128", 0) for name in ("LDG", "LDGSTS"))
    return [
        row.kernel,
        row.variant,
        str(row.arch),
        str(row.registers),
        str(row.spill_bytes + row.stack_bytes),
        f"{row.shared_bytes / 1024:.3g}",
        str(row.total),
        f"{row.per_element:.2f}" if row.per_element else "",
        ", ".join(matrix),
        str(loads),
        str(row.accesses.get("STG.128", 0)),
    ]


if __name__ == "__main__":
    sys.exit(main())
