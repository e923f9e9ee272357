"""A GPU's limits, and how much of it a compiled kernel can fill."""

from dataclasses import dataclass

from benchmarks.codegen import WARP


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
        partitions: of a processor, each with its share of the registers; a warp stays in one.
        registers: of a processor.
        register_unit: registers are given to a warp in multiples of this.
        shared_kib: of a processor.
        shared_unit: bytes; shared memory is given to a program in multiples of this.
        copy_gb_s: rate of a copy, read plus written.
        matmul_tflop_s: rate of a bf16 product.
    """

    name: str
    processors: int
    clock_ghz: float
    lanes: int
    warps: int
    programs: int
    partitions: int
    registers: int
    register_unit: int
    shared_kib: int
    shared_unit: int
    copy_gb_s: float
    matmul_tflop_s: float

    @property
    def lanes_per_us(self) -> float:
        """Instructions of single threads that the GPU issues in a microsecond, at most."""
        return self.processors * self.lanes * self.clock_ghz * 1e3


# source: NVIDIA H100 architecture white paper (a processor of compute capability 9.0) and the H200 SXM data sheet, of
# partitions and units cuda_occupancy.h of the CUDA toolkit; the two rates are 90% and 80% of the data sheet's 4.8 TB/s
# and 989 TFLOP/s, what copies and cuBLAS reach
H200 = Device("H200", 132, 1.98, 128, 64, 32, 4, 65536, 256, 228, 128, 4300.0, 790.0)
# shared memory the system takes of every program; source: CUDA programming guide, compute capability 9.0
RESERVED_BYTES = 1024


def occupancy(registers: int, shared_bytes: int, warps: int, device: Device = H200) -> float:
    """Return the share of a processor's warps that programs of this size can fill.

    Source: cuda_occupancy.h of the CUDA toolkit, cudaOccMaxBlocksPerSMRegsLimit and cudaOccMaxBlocksPerSMSmemLimit.

    Args:
        registers: of a thread.
        shared_bytes: of a program.
        warps: of a program.
        device: the GPU.
    """
    of_a_warp = _in_units(registers * WARP, device.register_unit)
    of_a_program = _in_units(shared_bytes + RESERVED_BYTES, device.shared_unit)
    # what is left of one partition is of no use to a warp of another
    by_registers = device.registers // device.partitions // of_a_warp * device.partitions // warps
    by_shared = device.shared_kib * 1024 // of_a_program
    programs = min(by_registers, by_shared, device.warps // warps, device.programs)
    return programs * warps / device.warps


def _in_units(size: int, unit: int) -> int:
    """Return the least multiple of a unit that holds a size."""
    return -(-size // unit) * unit
