"""What one compiled configuration of a kernel takes of a GPU, and the least time it needs there."""

from dataclasses import dataclass
from typing import Any

from benchmarks.codegen import WARP, Compiled, build, counted, variants_of
from benchmarks.codegen_table import SAMPLE
from benchmarks.device import H200, Device, occupancy
from benchmarks.machine_code import fewest, listings
from benchmarks.work import WORK, Shape, shapes_of

# of the H200
ARCH = 90


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
        per_element: the fewest instructions of all threads for one element; None where that is not counted.
        shape: of the work, or None where no time is predicted.
        memory_us: bytes at the copy rate.
        products_us: operations of products in half precision at their rate.
        issue_us: instructions at one for each lane and cycle: those counted, or the multiply-adds of float32.
        least_us: the largest of the three.
        binds: "memory", "products" or "instructions".
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
    products_us: float | None
    issue_us: float | None
    least_us: float | None
    binds: str | None


def predict(kernel: str, device: Device = H200) -> list[Prediction]:
    """Return the sampled configurations of a kernel, each on every shape that its work is known for."""
    known = {variant.name: variant for variant in variants_of(kernel)}
    variants = [known[name] for name in SAMPLE[kernel]]
    built = [build(variant, ARCH) for variant in variants]
    texts = listings([b.asm["cubin"] for b in built], ARCH)
    found = []
    for variant, one, text in zip(variants, built, texts, strict=True):
        compiled = counted(kernel, variant, one, text, ARCH)
        threads = WARP * variant.options["num_warps"]
        per_element = fewest(text) * threads / variant.weights if variant.weights else None
        for shape in shapes_of(kernel, variant) or (None,):
            found.append(prediction(compiled, variant, per_element, shape, device))
    return found


def prediction(
    compiled: Compiled, variant: Any, per_element: float | None, shape: Shape | None, device: Device = H200
) -> Prediction:
    """Return what a compiled configuration takes, and on a shape the least time.

    Args:
        compiled: its counts.
        variant: the configuration.
        per_element: the fewest instructions for one element, or None.
        shape: of the work, or None.
        device: the GPU.
    """
    times: dict[str, float] = {}
    if shape is not None:
        work = WORK[compiled.kernel](variant, shape)
        times["memory"] = work.moved / device.copy_gb_s / 1e3
        times["products"] = work.operations / device.matmul_tflop_s / 1e6
        times["instructions"] = (work.single + (per_element or 0) * work.elements) / device.lanes_per_us
    return Prediction(
        schema=2,
        kind="prediction",
        device=device.name,
        kernel=compiled.kernel,
        variant=compiled.variant,
        registers=compiled.registers,
        spill_bytes=compiled.spill_bytes + compiled.stack_bytes,
        shared_kib=compiled.shared_bytes / 1024,
        occupancy=occupancy(compiled.registers, compiled.shared_bytes, variant.options["num_warps"], device),
        per_element=per_element,
        shape=shape,
        memory_us=times.get("memory"),
        products_us=times.get("products"),
        issue_us=times.get("instructions"),
        least_us=max(times.values(), default=None),
        binds=max(times, key=times.__getitem__, default=None),
    )
