"""Versions, devices, which code runs each operation, and whether it is right."""

import contextlib
import importlib.metadata
import logging
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lora_core import backends
from lora_core.cpu import compiled
from lora_core.doctor.checks import CHECKS, check

PACKAGES = ("lora-core", "torch", "triton", "numba", "numpy", "scipy", "safetensors")
PEERS = ("transformers", "peft", "bitsandbytes", "accelerate")


@dataclass(frozen=True)
class SelfCheck:
    """One operation on one device.

    Args:
        operation: its name.
        device: where it ran.
        implementation: the module that ran it, or "reference".
        passed: whether it agrees with the reference.
        detail: what was compared, or what went wrong.
        paths: which ways its kernels took, as they log them; empty where they log none.
    """

    operation: str
    device: str
    implementation: str
    passed: bool
    detail: str
    paths: tuple[str, ...] = ()


@dataclass(frozen=True)
class Examination:
    """All that `lora-core doctor` reports."""

    versions: dict[str, str]
    machine: dict[str, str]
    checks: list[SelfCheck]

    @property
    def healthy(self) -> bool:
        return all(check.passed for check in self.checks)


def examine() -> Examination:
    """Return versions, machine and the self-check of every operation on every device there is."""
    versions = {
        "python": platform.python_version(),
        **{name: _version(name) for name in (*PACKAGES, *PEERS)},
    }
    why = backends.why_no_kernels()
    machine = {
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} used at once",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "kernels": "Triton kernels" if why is None else f"none, as {why}: CPU paths and the reference run",
    }
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return Examination(versions, machine, [check for device in devices for check in self_check(device)])


def self_check(device: str) -> list[SelfCheck]:
    """Return one result for each operation on this device; an exception counts as a failure."""
    if device == "cpu":
        # by themselves they come when there is much to do
        compiled.load_all()
    with _sums_in_float32():
        return [_run(operation, device) for operation in CHECKS]


@contextlib.contextmanager
def _sums_in_float32() -> Iterator[None]:
    """Let cuBLAS multiply and add as the bounds have it, whatever the environment or a program says."""
    matmul = torch.backends.cuda.matmul
    before: dict[str, Any] = {}
    # of PyTorch's two ways to allow TF32 the older sets both, and cannot be read where the newer alone was used
    with contextlib.suppress(RuntimeError):
        before["allow_tf32"] = matmul.allow_tf32
    before["fp32_precision"] = matmul.fp32_precision
    reductions = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    for name in reductions:
        # each is two switches where PyTorch has the second, and set by a pair
        second = f"{name}_split_k"
        value = getattr(matmul, name)
        before[name] = (value, getattr(matmul, second)) if hasattr(matmul, second) else value
    try:
        for name in ("allow_tf32", *reductions):
            setattr(matmul, name, False)
        yield
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)


def _run(operation: str, device: str) -> SelfCheck:
    with _Paths() as paths:
        try:
            passed, detail = True, check(operation, device)
        except Exception as error:
            passed, detail = False, f"{type(error).__name__}: {error}"
    # asked after the check, as a kernel may be imported by it
    where = backends.implementation(operation, device)
    return SelfCheck(operation, device, where, passed, detail, tuple(dict.fromkeys(paths.said)))


class _Paths(logging.Handler):
    """What the kernels log of their paths while this is entered."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())

    def __enter__(self) -> "_Paths":
        log = logging.getLogger("lora_core.kernels")
        self._before = log.level, log.propagate
        log.setLevel(logging.DEBUG)
        log.propagate = False
        log.addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        log = logging.getLogger("lora_core.kernels")
        log.removeHandler(self)
        level, log.propagate = self._before
        log.setLevel(level)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
