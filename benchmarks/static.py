"""What the compiled kernels promise without a GPU: `python -m benchmarks.run --suite static`.

Registers, shared memory and occupancy of every sampled configuration on an H200 (predict.py), and for the kernels whose
work is known (work.py) the least time that it needs there. These are predictions: nothing is run. They go as JSON lines
into benchmarks/results/static and between two markers into docs/performance.md, or with --results into another folder
alone. Must run without TRITON_INTERPRET.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.codegen import interpreted, kernel_names, variants_of
from benchmarks.device import H200, Device
from benchmarks.markers import rewrite, row
from benchmarks.predict import Prediction, predict
from benchmarks.record import RESULTS
from benchmarks.shapes import GPU_WEIGHTS, written

COMMITTED = RESULTS / "static"
PERFORMANCE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
COMMAND = "python -m benchmarks.static"
# the kernel files of operations that are made of several, or share their kernel
LINEAR = ("low_rank_matmul", "row_sum", "shrink", "split_sum")
KERNELS_OF = {
    "lora_linear": LINEAR,
    "lora_linears": LINEAR,
    "lora_dropout": LINEAR,
    "nf4_lora_linear": ("nf4_matmul", "nf4_dequantize", "nf4_columns", *LINEAR),
    "dora_norm": ("dora_norm", "split_sum"),
    "rms_norm": ("rms_norm", "split_sum"),
    "grouped_lora": ("gather_expand", "gather_gradient", "gather_shrink"),
}


def main(arguments: Sequence[str] | None = None, program: str = COMMAND) -> int:
    """Compile, predict, print, and write; return 0, or 2 where kernels cannot be compiled.

    The committed rows and table are of all kernels: a part of them is printed, and written into another folder alone.

    Args:
        arguments: of the command line; by default those of the process.
        program: what the messages call it.
    """
    names = kernel_names()
    parser = argparse.ArgumentParser(prog=program, description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", action="append", help="repeat for more; all by default")
    parser.add_argument("--results", type=Path, default=COMMITTED, help="folder that predictions.jsonl is written in")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.kernel or [] if name not in names]
    if unknown:
        parser.error(f"{', '.join(unknown)}: no kernel, and nothing to predict; want one of {', '.join(names)}")
    if interpreted(variants_of(names[0])):
        sys.stderr.write(f"{program}: unset TRITON_INTERPRET, which keeps kernels from being compiled\n")
        return 2
    found = [p for kernel in options.kernel or names for p in predict(kernel)]
    print(table(found))
    # the folder of all results is what benchmarks.run has by default
    committed = options.results.resolve() in (COMMITTED.resolve(), RESULTS.resolve())
    folder = COMMITTED if committed else options.results
    if committed and options.kernel:
        sys.stderr.write(f"{program}: not all kernels, so nothing is written; --results FOLDER writes them there\n")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(p)) for p in found]
    (folder / "predictions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if committed:
        rewrite(PERFORMANCE, COMMAND, table(found))
    return 0


def kernels_of(operations: Iterable[str]) -> list[str]:
    """Return the kernel files of these operations, each once; an operation without any stands for itself."""
    return list(dict.fromkeys(kernel for op in operations for kernel in KERNELS_OF.get(op, (op,))))


def table(found: Iterable[Prediction]) -> str:
    """Return the predictions as Markdown, a row for each configuration and kind of work."""
    weights = [f"{weight['N']} x {weight['K']}" for weight in GPU_WEIGHTS]
    head = ["kernel", "configuration", "registers", "shared KiB", "occupancy", "per element", "work", *weights]
    rows = itertools.groupby(found, key=lambda p: (p.kernel, p.variant))
    return "\n".join([_text(H200), "", row(head), row(["---"] * len(head)), *(row(_cells([*g])) for _, g in rows)])


def _text(device: Device) -> str:
    moved, multiplied = f"{device.copy_gb_s:,.0f} GB/s", f"{device.matmul_tflop_s:.0f} TFLOP/s"
    return f"""\
Predictions for one {device.name}, from compiled code: nothing here was measured.

The last columns are the least time in microseconds by the weight, N x K, and what binds. It is the largest of three:
"memory", the bytes at {moved}, each operand read from memory and each result written once; "products", the
operations of products in half precision at {multiplied}; "instructions" at one for each lane and cycle. In a
kernel without a loop these are the fewest on any way to its end, without what unusual operands alone take, "per
element" of the result. In the others they are the multiply-adds of float32 alone: decoding a weight, dropout and
addresses come on top. On top of all comes the launch.

M is a number of tokens that the configuration is for, R the ranks of its step, and where there are G adapters each row
has one of its own. Of a split sum one part is counted. `split_sum`, which adds the parts, has no time: how many there
are and how large depends on the device and on what calls it."""


def _cells(of_one: Sequence[Prediction]) -> list[str]:
    """Return the cells of a configuration, whose predictions differ in the weight alone."""
    first = of_one[0]
    sizes = {name: size for name, size in (first.shape or {}).items() if name not in "NK"}
    return [
        first.kernel,
        first.variant,
        str(first.registers),
        f"{first.shared_kib:.3g}",
        f"{100 * first.occupancy:.3g}%",
        f"{first.per_element:.2f}" if first.per_element else "",
        written(sizes),
        # three digits, and no exponent
        *(f"{float(f'{p.least_us:.3g}'):g} {p.binds}" if p.least_us else "" for p in of_one),
        # of what has no time
        *([""] * (len(GPU_WEIGHTS) - len(of_one))),
    ]


if __name__ == "__main__":
    sys.exit(main())
