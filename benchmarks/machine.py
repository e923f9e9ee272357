"""The machine a measurement ran on, and how fast it copies and multiplies: the floor under any implementation."""

import functools
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.case import Provider
from benchmarks.timing import clock_of

# bytes copied, of which as many are read as written, and the side of a square product: on a GPU what takes so long that
# launching it does not count
COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
TRIES = 5
ROOT = Path(__file__).resolve().parent.parent
# what benchmarks write: it changes while they run, and nothing that is measured
WRITTEN = ("benchmarks/results", "benchmarks/pictures", "docs/pictures", "README.md", "docs/performance.md")
WRITTEN += ("kernels/README.md",)


def describe(device: str) -> dict[str, Any]:
    """Return the fields of a record that say where it was measured; to be asked once, at the start of a run."""
    import torch

    on_gpu = torch.device(device).type == "cuda"
    # a maker's processors may share a name and differ in what they run, and by a factor of two and more in speed
    instructions = torch.backends.cpu.get_cpu_capability()
    here = f"{processor()}, {instructions}, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if on_gpu else here
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        **checkout(),
        "device": name,
        "driver": _driver() if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
    }


def processor(info: Path | None = None) -> str:
    """Return the processor's name, with family and model: a virtual machine may hide which generation it is."""
    from lora_core.cpu.processor import CPUINFO, cpuinfo

    about = cpuinfo(info or CPUINFO)
    if "model name" not in about:
        return platform.processor() or platform.machine()
    if "cpu family" not in about:
        return about["model name"]
    return f"{about['model name']} family {about['cpu family']} model {about['model']}"


def checkout(root: Path = ROOT) -> dict[str, Any]:
    """Return the commit checked out, and whether tracked files differ from it, but for what benchmarks write.

    Where the files are a copy without git's own, the variable LORA_CORE_COMMIT says which commit they were copied from.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        others = [f":(exclude){path}" for path in WRITTEN]
        changed = git("status", "--porcelain", "-uno", "--", ".", *others)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        copied = os.environ.get("LORA_CORE_COMMIT")
        return {"commit": copied or "unknown", "dirty": not copied}


def _driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


@functools.cache
def copy_rate(device: str) -> float:
    """Return the bytes a second this device copies, read plus written; measured, the best of a few tries."""
    import torch

    kind = torch.device(device).type
    moved = COPY_BYTES[kind]
    source = torch.zeros(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return moved / _best(lambda: target.copy_(source), kind)


@functools.cache
def matmul_rate(device: str, dtype: str) -> float:
    """Return the operations a second this device multiplies with; measured, the best of a few tries.

    Of random numbers, as a GPU multiplies equal ones with less power, and so faster than it does any others.
    """
    import torch

    kind = torch.device(device).type
    size = MATMUL_SIZE[kind]
    a = torch.randn(size, size, device=device, generator=torch.Generator(device).manual_seed(0))
    a = a.to(getattr(torch, dtype))
    return 2 * size**3 / min(_best(functools.partial(run, a, a), kind) for run in products(kind).values())


def products(device_type: str) -> dict[str, Callable[[Any, Any], Any]]:
    """Return the ways there are to compute a b^T, by name: on a CPU, PyTorch carries more than one library."""
    import torch.nn.functional as F

    if device_type != "cpu":
        return {"torch": F.linear}
    from lora_core.cpu.product import product

    return {"torch": F.linear, "lora_core": product}


def floor_ms(device: str, dtype: str, bytes_moved: int | None, flops: int | None) -> float | None:
    """Return the least time the work can take here: bytes at the copy rate or operations at the matmul rate."""
    times = []
    if bytes_moved is not None:
        times.append(bytes_moved / copy_rate(device))
    # bytes may be of a dtype that no matmul takes
    if flops is not None:
        times.append(flops / matmul_rate(device, dtype))
    return 1e3 * max(times) if times else None


def _best(run: Callable[[], Any], kind: str) -> float:
    """Return the seconds of the fastest of a few tries, by the device's own clock where it has one."""
    clock, provider = clock_of(kind), Provider("torch", run)
    return min(clock(provider, None) for _ in range(TRIES)) / 1e3
