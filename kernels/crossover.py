"""Which path a linear layer takes: one fused product, or the library's product and the low-rank one added in place.

A library's matrix product can be faster than Triton's by more than the fusion saves, so the choice is measured, and
written down: `python -m benchmarks.crossover` times both paths on a GPU and stores the result in crossover.json, or in
the file that LORA_CORE_CROSSOVER names. On a GPU without a measurement the library's product runs, which is never
slower than the plain way.
"""

import functools
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_core.kernels.form import ALIGNMENT
from lora_core.kernels.log import log

SHIPPED = Path(__file__).with_name("crossover.json")
VARIABLE = "LORA_CORE_CROSSOVER"
PATHS = ("fused", "library")


@dataclass(frozen=True)
class Measurement:
    """Times of both paths for x [m, k], W [n, k] and rank r on one device.

    Args:
        device: as torch.cuda.get_device_name says.
        dtype: of x and W, such as "bfloat16".
        m, n, k, r: sizes.
        fused_ms, library_ms: medians.
    """

    device: str
    dtype: str
    m: int
    n: int
    k: int
    r: int
    fused_ms: float
    library_ms: float

    @property
    def faster(self) -> str:
        return "fused" if self.fused_ms < self.library_ms else "library"

    def speaks_of(self, n: int, k: int) -> bool:
        """Say whether matrices of these sizes are loaded as the measured ones: 16 bytes at once, or by the element."""
        return _are_multiples_of_16(self.n, self.k) == _are_multiples_of_16(n, k)

    def distance(self, *sizes: int) -> float:
        """How far these sizes are from the measured ones: the sum of squared logarithms of their ratios."""
        own = (self.m, self.n, self.k, self.r)
        return sum(math.log2(max(a, 1) / max(b, 1)) ** 2 for a, b in zip(own, sizes, strict=True))


def _are_multiples_of_16(*sizes: int) -> bool:
    return not any(size % ALIGNMENT for size in sizes)


def load(path: Path) -> tuple[Measurement, ...]:
    """Return what a file holds.

    Raises:
        OSError, ValueError, TypeError: if it cannot be opened, is no JSON, or its rows are no measurements.
    """
    return tuple(Measurement(**row) for row in json.loads(path.read_text(encoding="utf-8")))


def read(path: Path) -> tuple[Measurement, ...]:
    """Return what a file holds; nothing, and a warning in the log, where it cannot be read."""
    try:
        return load(path)
    except (OSError, ValueError, TypeError) as error:
        log.warning("%s holds no measurements (%s): the library's matrix product runs", path, error)
        return ()


@functools.cache
def measurements() -> tuple[Measurement, ...]:
    """Return the measurements in force, read once per process."""
    return read(Path(os.environ.get(VARIABLE) or SHIPPED))


@functools.lru_cache(maxsize=4096)
def faster_path(device: str, dtype: torch.dtype, m: int, n: int, k: int, r: int) -> str:
    """Return "fused" or "library": what was faster for the nearest measured sizes on this device, else "library".

    Sizes that are no multiples of 16 are loaded another way, and compared with measurements of such sizes alone.
    """
    name = str(dtype).removeprefix("torch.")
    near = [row for row in measurements() if (row.device, row.dtype) == (device, name) and row.speaks_of(n, k)]
    return min(near, key=lambda row: row.distance(m, n, k, r)).faster if near else "library"


@functools.cache
def device_name(device: torch.device) -> str:
    """Return the name that measurements go by."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
