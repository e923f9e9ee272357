"""What the compiled kernels promise without a GPU: `python -m benchmarks.run --suite static`.

Registers, shared memory and occupancy of every sampled configuration on an H200, and for the kernels whose work is
known the least time that bytes and instructions need there. These are predictions: nothing is run.
They go into docs/performance.md between two markers, and as JSON lines into benchmarks/results/static.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.codegen import WARP, Compiled, compile_variants, kernel_names, variants_of
from benchmarks.codegen_table import SAMPLE
from benchmarks.markers import rewrite, row
from benchmarks.record import RESULTS
from benchmarks.shapes import GPU_WEIGHTS

PERFORMANCE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
COMMAND = "python -m benchmarks.static"
ARCH = 90
# the kernel files of operations that are made of several, or share their kernel
LINEAR = ("low_rank_matmul", "row_sum", "shrink", "split_sum")
KERNELS_OF = {
    "lora_linear": LINEAR,
    "lora_linears": LINEAR,
    "nf4_lora_linear": ("nf4_matmul", "nf4_dequantize", "nf4_columns", *LINEAR),
    "dora_norm": ("dora_norm", "split_sum"),
    "grouped_lora": ("gather_expand", "gather_gradient", "gather_shrink"),
}
BLOCK_SIZE = 64


@dataclass(frozen=True)
class Device:
    """A GPU's limits.

    Args:
        name: of the GPU.
        processors: streaming multiprocessors.
        clock_ghz: boost clock.
        lanes: threads that a processor issues an instruction for in a cycle.
        warps: that a processor holds.
        programs: that a processor holds.
        registers: of a processor.
        register_unit: registers are given to a warp in multiples of this.
        shared_kib: of a processor.
        copy_gb_s: rate of a copy, read plus written.
        matmul_tflop_s: rate of a bf16 product.
    """

    name: str
    processors: int
    clock_ghz: float
    lanes: int
    warps: int
    programs: int
    registers: int
    register_unit: int
    shared_kib: int
    copy_gb_s: float
    matmul_tflop_s: float


# source: NVIDIA H100 architecture white paper (a processor of compute capability 9.0) and the H200 SXM data sheet; the
# two rates are 90% and 80% of the data sheet's 4.8 TB/s and 989 TFLOP/s, what copies and cuBLAS reach
H200 = Device("H200", 132, 1.98, 128, 64, 32, 65536, 256, 228, 4300.0, 790.0)
# shared memory the system takes of every program; source: CUDA programming guide, compute capability 9.0
RESERVED_KIB = 1.0


@dataclass(frozen=True)
class Prediction:
    """What a configuration takes of the device, and where its work is known the least time it needs.

    Args:
        schema: version of this list of fields.
        kind: always "prediction": no row of this was measured.
        device: the GPU it is about.
        kernel: the kernel's file.
        variant: the configuration's name.
        registers: of a thread.
        spill_bytes: of a thread.
        shared_kib: of a program.
        occupancy: warps a processor holds at once, over the most it could.
        per_element: instructions of all threads for one element; None where that is not counted.
        shape: of the work, or None where no time is predicted.
        memory_us: bytes at the copy rate.
        issue_us: instructions at one for each lane and cycle.
        least_us: the larger of the two.
        binds: "memory" or "instructions".
    """

    schema: int
    kind: str
    device: str
    kernel: str
    variant: str
    registers: int
    spill_bytes: int
    shared_kib: float
    occupancy: float
    per_element: float | None
    shape: dict[str, int] | None
    memory_us: float | None
    issue_us: float | None
    least_us: float | None
    binds: str | None


def main(arguments: Sequence[str] | None = None, program: str = COMMAND) -> int:
    """Compile, predict, print, and write the table and the rows where all kernels were asked for."""
    parser = argparse.ArgumentParser(prog=program, description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", action="append", choices=kernel_names(), help="repeat for more; all by default")
    parser.add_argument("--results", type=Path, default=RESULTS / "static", help="folder of the rows")
    parser.add_argument("--page", type=Path, default=PERFORMANCE, help="the file whose table is written")
    options = parser.parse_args(arguments)
    found = [p for kernel in options.kernel or kernel_names() for p in predict(kernel)]
    print(table(found))
    if options.kernel is None:
        options.results.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(asdict(p)) for p in found]
        (options.results / "predictions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        rewrite(options.page, COMMAND, table(found))
    return 0


def kernels_of(operations: Iterable[str]) -> list[str]:
    """Return the kernel files of these operations, each once; an operation without any stands for itself."""
    return list(dict.fromkeys(kernel for op in operations for kernel in KERNELS_OF.get(op, (op,))))


def predict(kernel: str, device: Device = H200) -> list[Prediction]:
    """Return the sampled configurations of a kernel, each on every shape that its work is known for."""
    known = {variant.name: variant for variant in variants_of(kernel)}
    found = []
    for built in compile_variants(kernel, [known[name] for name in SAMPLE[kernel]], ARCH):
        warps = known[built.variant].options["num_warps"]
        weights = GPU_WEIGHTS if kernel in BYTES and built.per_element else (None,)
        found += [_prediction(built, warps, shape, device) for shape in weights]
    return found


def _prediction(built: Compiled, warps: int, shape: dict[str, int] | None, device: Device) -> Prediction:
    memory = issue = least = binds = None
    if shape is not None and built.per_element:
        elements, moved = BYTES[built.kernel](shape["N"] * shape["K"], built.variant)
        memory = moved / device.copy_gb_s / 1e3
        issue = built.per_element * elements / (device.processors * device.lanes * device.clock_ghz) / 1e3
        least = max(memory, issue)
        binds = "memory" if memory >= issue else "instructions"
    return Prediction(
        schema=1,
        kind="prediction",
        device=device.name,
        kernel=built.kernel,
        variant=built.variant,
        registers=built.registers,
        spill_bytes=built.spill_bytes + built.stack_bytes,
        shared_kib=built.shared_bytes / 1024,
        occupancy=occupancy(built.registers, built.shared_bytes, warps, device),
        per_element=built.per_element,
        shape=shape,
        memory_us=memory,
        issue_us=issue,
        least_us=least,
        binds=binds,
    )


def _weights_bytes(n: int, variant: str) -> tuple[int, float]:
    """Weights of the variant's dtype on one side; codes and scales on the other, nested where it says so."""
    block = int(variant.split()[1])
    scales = n / block
    each = 1 + 4 / 256 if "nested" in variant else 4
    return n, n * (4 if variant.startswith("fp32") else 2) + n / 2 + scales * each


def _scales_bytes(n: int, variant: str) -> tuple[int, float]:
    """Scales of a weight in blocks of 64, in float32 and as codes."""
    scales = n // BLOCK_SIZE
    return scales, scales * (4 + 1 + 4 / 256)


# elements a kernel makes for a weight of n elements, and the bytes it has to move
BYTES = {
    "nf4_dequantize": _weights_bytes,
    "nf4_quantize": _weights_bytes,
    "absmax_dequantize": _scales_bytes,
    "absmax_quantize": _scales_bytes,
}


def occupancy(registers: int, shared_bytes: int, warps: int, device: Device = H200) -> float:
    """Return the share of a processor's warps that programs of this size can fill.

    Args:
        registers: of a thread.
        shared_bytes: of a program.
        warps: of a program.
        device: the GPU.
    """
    of_a_warp = -(-registers * WARP // device.register_unit) * device.register_unit
    by_registers = device.registers // of_a_warp // warps
    by_shared = int(device.shared_kib / (shared_bytes / 1024 + RESERVED_KIB))
    programs = min(by_registers, by_shared, device.warps // warps, device.programs)
    return programs * warps / device.warps


def table(found: Iterable[Prediction]) -> str:
    """Return the predictions as Markdown."""
    head = ["kernel", "configuration", "registers", "shared KiB", "occupancy", "per element", "shape"]
    head += ["least time, us", "bound by"]
    return "\n".join(
        [
            f"Predictions for one {H200.name}, from compiled code: nothing here was measured.",
            "",
            row(head),
            row(["---"] * len(head)),
            *(row(_cells(p)) for p in found),
        ]
    )


def _cells(p: Prediction) -> list[str]:
    return [
        p.kernel,
        p.variant,
        str(p.registers),
        f"{p.shared_kib:.3g}",
        f"{p.occupancy:.0%}",
        f"{p.per_element:.2f}" if p.per_element else "",
        f"{p.shape['N']} x {p.shape['K']}" if p.shape else "",
        f"{p.least_us:.3g}" if p.least_us else "",
        p.binds or "",
    ]


if __name__ == "__main__":
    sys.exit(main())
