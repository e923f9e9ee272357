"""What the system says of the processor."""

import functools
import platform
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")
# what Intel's processors call their maker
INTEL = "GenuineIntel"


@functools.cache
def cpuinfo(path: Path = CPUINFO) -> dict[str, str]:
    """Return what Linux says of the first core, by name; nothing where there is no such file."""
    if not path.exists():
        return {}
    first, _, _ = path.read_text(encoding="utf-8", errors="replace").partition("\n\n")
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def maker() -> str:
    """Return who made the processor, as it calls itself; "" where that cannot be told."""
    about = cpuinfo()
    return about.get("vendor_id", "") if about else platform.processor().rpartition(" ")[2]


def multiplies_bfloat16_tiles(path: Path = CPUINFO) -> bool:
    """Say whether Linux names AMX for bfloat16 among the processor's features."""
    return "amx_bf16" in cpuinfo(path).get("flags", "").split()


def has_avx512() -> bool:
    """Say whether PyTorch finds AVX-512 here."""
    return str(torch.backends.cpu.get_cpu_capability()).startswith("AVX512")
