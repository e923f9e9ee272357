"""`lora-core doctor` and the program's shell."""

import importlib.metadata
import json
import subprocess
import sys

import pytest
import torch

from lora_core import cli, doctor
from lora_core.doctor import checks
from lora_core.doctor.agreement import within
from lora_core.doctor.report import self_check


def test_doctor_finds_every_operation_sound(capsys):
    cli.main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"] and len(report["checks"]) == 22
    assert report["versions"]["torch"] == importlib.metadata.version("torch")
    runs = {c["operation"]: c["implementation"] for c in report["checks"]}
    assert (
        runs["nf4_dequantize"] == "lora_core.cpu.nf4_dequantize" and runs["lora_linear"] == "lora_core.cpu.lora_linear"
    )


@pytest.mark.parametrize(
    "broken",
    [
        *("nf4_quantize", "nf4_dequantize", "absmax_quantize", "absmax_dequantize"),
        *("lora_linear", "nf4_lora_linear", "lora_linears", "dora_norm", "grouped_lora"),
        *("rms_norm", "swiglu", "rotary", "causal_attention"),
    ],
)
def test_doctor_finds_a_broken_operation(monkeypatch, capsys, broken):
    """A result 1% off, or codes one off, is a failure and the exit status says so."""
    module = sys.modules[checks.CHECKS[broken].__module__]
    right = getattr(module, broken)

    def wrong(*args):
        result = right(*args)
        if isinstance(result, list):
            return [1.01 * y for y in result]
        return (result[0] + 1, result[1]) if isinstance(result, tuple) else result * 1.01

    monkeypatch.setattr(module, broken, wrong)
    assert broken in {check.operation for check in self_check("cpu") if not check.passed}
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor"])
    assert stop.value.code == 1
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.parametrize("way", ["allow_tf32", "fp32_precision"])
def test_doctor_multiplies_in_float32_whatever_a_program_says_and_says_so_again_after(monkeypatch, way):
    matmul = torch.backends.cuda.matmul
    names = ["fp32_precision", *(f"allow_{half}_reduced_precision_reduction" for half in ("bf16", "fp16"))]
    before = {name: getattr(matmul, name) for name in names}
    seen = {}
    monkeypatch.setattr(checks, "lora_linear", lambda *args: seen.update({n: getattr(matmul, n) for n in names}))
    try:
        setattr(matmul, way, True if way == "allow_tf32" else "tf32")
        matmul.allow_bf16_reduced_precision_reduction = True
        said = {name: getattr(matmul, name) for name in names}
        doctor.self_check("cpu")
        assert seen == {"fp32_precision": "ieee", **dict.fromkeys(names[1:], False)}
        assert {name: getattr(matmul, name) for name in names} == said
    finally:
        matmul.allow_tf32 = False
        for name, value in before.items():
            setattr(matmul, name, value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_doctor_bounds_half_precision_by_five_roundings(dtype):
    """Next above 1 are numbers two roundings apart: two steps are within, three are not, of one element or of all."""
    truth, eps = torch.ones(64, dtype=torch.float64), torch.finfo(dtype).eps
    for steps, wanted in ((2, True), (3, False)):
        one, every = torch.ones(64, dtype=dtype), torch.full((64,), 1 + steps * eps, dtype=dtype)
        one[5] += steps * eps
        assert within(one, truth, truth, 2) is wanted
        # terms of a sum that cancel allow one element more, and all together no more
        assert within(one, truth, 100 * truth, 2)
        assert within(every, truth, 100 * truth, 2) is wanted


def test_doctor_bounds_float32_by_its_sums():
    """Of two products and two more roundings: 2 eps times the root of 4."""
    truth, eps = torch.ones(64, dtype=torch.float64), torch.finfo(torch.float32).eps
    for steps, wanted in ((4, True), (5, False)):
        got = torch.ones(64)
        got[5] += steps * eps
        assert within(got, truth, truth, 2) is wanted


def test_doctor_counts_an_exception_as_a_failure(monkeypatch):
    def burst(*args):
        raise MemoryError("no room")

    monkeypatch.setattr(checks, "lora_linear", burst)
    failed = [c for c in doctor.self_check("cpu") if not c.passed]
    assert [c.operation for c in failed] == ["lora_linear", "lora_linear_backward"]
    assert "MemoryError: no room" in failed[0].detail


def test_program_help_names_every_command():
    done = subprocess.run(
        [sys.executable, "-c", "from lora_core.cli import main; main(['--help'])"], capture_output=True
    )
    assert done.returncode == 0
    assert all(name in done.stdout.decode() for name in cli.COMMANDS)


def test_program_ends_bad_input_with_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["inspect", "no/such/file"])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("lora-core: CheckpointError:") and message.count("\n") == 1


def test_program_shows_its_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"lora-core {importlib.metadata.version('lora-core')}\n"
