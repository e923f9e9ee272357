"""What this installation can do: versions, devices, which code runs each operation, and whether it is right.

The self-check runs every operation on small inputs and compares it with the reference: dequantisation and codes to the
bit, matrix products within a rounding bound.
"""

import importlib.metadata
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_core import backends
from lora_core.ops.absmax_dequantize import absmax_dequantize
from lora_core.ops.absmax_quantize import absmax_quantize
from lora_core.ops.lora_linear import lora_linear
from lora_core.ops.nf4_dequantize import nf4_dequantize
from lora_core.ops.nf4_lora_linear import nf4_lora_linear
from lora_core.ops.nf4_quantize import nf4_quantize
from lora_core.quant import QuantizedWeight, double, quantize_nf4
from lora_core.reference import lora, nf4

PACKAGES = ("torch", "triton", "numpy", "scipy", "safetensors", "transformers", "peft", "bitsandbytes", "accelerate")
# odd on purpose: blocks straddle rows and the last is short
M, N, K, R = 5, 33, 70, 3


@dataclass(frozen=True)
class SelfCheck:
    """One operation on one device.

    Args:
        operation: its name.
        device: where it ran.
        implementation: the module that ran it, or "reference".
        passed: whether it agrees with the reference.
        detail: what was compared, or what went wrong.
    """

    operation: str
    device: str
    implementation: str
    passed: bool
    detail: str


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
    versions = {"python": platform.python_version(), **{name: _version(name) for name in ("lora-core", *PACKAGES)}}
    machine = {
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "kernels": "Triton kernels" if backends.kernels_can_run() else "none: CPU paths and the reference run",
    }
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return Examination(versions, machine, [check for device in devices for check in self_check(device)])


def self_check(device: str) -> list[SelfCheck]:
    """Return one result for each operation on this device; an exception counts as a failure."""
    checks = {
        "nf4_quantize": _check_quantize,
        "nf4_dequantize": _check_dequantize,
        "absmax_quantize": _check_absmax_quantize,
        "absmax_dequantize": _check_absmax_dequantize,
        "lora_linear": _check_linear,
        "lora_linear_backward": _check_backward,
        "nf4_lora_linear": _check_nf4_linear,
    }
    return [_run(operation, device, check) for operation, check in checks.items()]


def _run(operation: str, device: str, check: Callable[[str], str]) -> SelfCheck:
    where = backends.implementation(operation, device)
    try:
        return SelfCheck(operation, device, where, True, check(device))
    except Exception as error:
        return SelfCheck(operation, device, where, False, f"{type(error).__name__}: {error}")


class Disagreement(Exception):
    """An operation's result is not the reference's."""


def _operands(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x, weight, bias, a, b = (
        torch.randn(s, generator=g).to(device, dtype) for s in ((M, K), (N, K), (N,), (R, K), (N, R))
    )
    return x, weight, bias, a, b


def _check_quantize(device: str) -> str:
    for dtype in (torch.float32, torch.bfloat16):
        weight = _operands(device, dtype)[1]
        for got, want in zip(nf4_quantize(weight, 64), nf4.nf4_quantize(weight, 64), strict=True):
            _require(torch.equal(got, want), f"codes or scales of a {dtype} weight differ")
    return "codes and scales equal"


def _check_dequantize(device: str) -> str:
    weight = _operands(device, torch.float32)[1]
    for double_quant in (False, True):
        q = quantize_nf4(weight, 64, double_quant)
        packed = (q.codes, q.absmax, q.nested_absmax, q.nested_offset, q.shape)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            same = torch.equal(nf4_dequantize(*packed, dtype, 64), nf4.nf4_dequantize(*packed, dtype, 64))
            _require(same, f"{dtype} weights differ, double quantisation {double_quant}")
    return "equal to the bit, three dtypes"


def _scales(device: str) -> tuple[Tensor, Tensor]:
    absmax = _operands(device, torch.float32)[1].abs().flatten()
    return absmax, double.absmax_offset(absmax)


def _check_absmax_quantize(device: str) -> str:
    absmax, offset = _scales(device)
    for got, want in zip(absmax_quantize(absmax, offset), double.quantize_absmax(absmax, offset), strict=True):
        _require(torch.equal(got, want), "codes or second-level scales differ")
    return "codes and scales equal"


def _check_absmax_dequantize(device: str) -> str:
    absmax, offset = _scales(device)
    nested = (*double.quantize_absmax(absmax, offset), offset)
    _require(torch.equal(absmax_dequantize(*nested), double.dequantize_absmax(*nested)), "scales differ")
    return "equal to the bit"


def _check_linear(device: str) -> str:
    args = _operands(device, torch.float32)
    _require_close(lora_linear(*args, 0.5), args, args[1])
    return "within rounding"


def _check_nf4_linear(device: str) -> str:
    x, weight, bias, a, b = _operands(device, torch.float32)
    q: QuantizedWeight = quantize_nf4(weight)
    _require_close(nf4_lora_linear(x, q, bias, a, b, 0.5), (x, weight, bias, a, b), q.dequantize())
    return "within rounding"


def _check_backward(device: str) -> str:
    x, weight, bias, a, b = (t.double() for t in _operands(device, torch.float32))
    leaves = x, a, b = x.requires_grad_(), a.requires_grad_(), b.requires_grad_()
    got = torch.autograd.grad(lora_linear(x, weight, bias, a, b, 0.5).square().sum(), leaves)
    want = torch.autograd.grad(lora.lora_linear(x, weight, bias, a, b, 0.5).square().sum(), leaves)
    for name, g, w in zip(("x", "lora_a", "lora_b"), got, want, strict=True):
        # both sides in float64: a float32 rounding of the largest entry stands far above their difference
        _require(bool(((g - w).abs() <= torch.finfo(torch.float32).eps * w.abs().max()).all()), f"d_{name} differs")
    return "gradients as autograd's"


def _require_close(got: Tensor, args: tuple[Tensor, ...], weight: Tensor) -> None:
    x, _, bias, a, b = (t.double() for t in args)
    truth = lora.lora_linear(x, weight.double(), bias, a, b, 0.5)
    magnitude = lora.lora_linear(x.abs(), weight.double().abs(), bias.abs(), a.abs(), b.abs(), 0.5)
    # float32 sums of K + R + 2 products; Higham and Mary 2019
    bound = 2.0 * torch.finfo(torch.float32).eps * (K + R + 2) ** 0.5 * magnitude
    _require(bool(((got.double() - truth).abs() <= bound).all()), "outside the rounding bound")


def _require(agrees: bool, otherwise: str) -> None:
    if not agrees:
        raise Disagreement(otherwise)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
