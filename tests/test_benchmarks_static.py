"""The suite without a GPU: occupancy, bytes and predictions from the compiled kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import run, static
from benchmarks.markers import replaced


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "share"),
    [
        # 32 registers a thread fill all 64 warps; 128 a quarter of them
        (32, 0, 4, 1.0),
        (128, 0, 4, 0.25),
        # 168 registers are 5,376 a warp: 12 warps
        (168, 0, 4, 12 / 64),
        # 113 KiB a program: two of them with what the system takes
        (32, 112 * 1024, 4, 8 / 64),
        # programs of one warp: at most 32
        (16, 0, 1, 0.5),
    ],
)
def test_occupancy_is_what_the_registers_and_memory_allow(registers, shared, warps, share):
    assert static.occupancy(registers, shared, warps) == share


ROOT = Path(__file__).resolve().parent.parent


def test_predicted_bytes_are_codes_scales_and_weights():
    n = 4096 * 14336
    elements, moved = static.BYTES["nf4_dequantize"](n, "bf16 64 nested words")
    assert elements == n and moved == n / 2 + n / 64 * (1 + 4 / 256) + 2 * n
    assert static.BYTES["nf4_quantize"](n, "fp32 4096 bytes")[1] == 4 * n + n / 2 + n / 4096 * 4


def test_static_suite_predicts_and_says_that_it_does(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- begin: written by python -m benchmarks.static -->\n<!-- end -->\n")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.static", "--kernel", "absmax_dequantize", "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "nothing here was measured" in done.stdout and done.stdout.count("| absmax_dequantize |") == 3
    assert not list(tmp_path.glob("*.jsonl"))


def test_static_suite_knows_the_kernels_of_every_operation_that_has_some(monkeypatch):
    asked = []
    monkeypatch.setattr(static, "main", lambda arguments, program: asked.append(arguments) or 0)
    without = {"fuse", "generation_step", "inject", "roof", "training_step"}
    for op in set(run.case_names()) - without:
        assert run.main(["--suite", "static", "--op", op]) == 0
        files = asked[-1][1::2]
        assert asked[-1][::2] == ["--kernel"] * len(files) and set(files) <= set(static.kernel_names()), op
    assert run.main(["--suite", "static", "--op", "lora_linear", "--op", "lora_linears"]) == 0
    assert asked[-1].count("shrink") == 1 and "low_rank_matmul" in asked[-1]
    # every kernel belongs to an operation
    assert set(static.kernels_of(run.case_names())) - without >= set(static.kernel_names())


def test_predictions_in_the_documentation_are_those_on_record():
    import json

    lines = (ROOT / "benchmarks" / "results" / "static" / "predictions.jsonl").read_text().splitlines()
    found = [static.Prediction(**json.loads(line)) for line in lines]
    assert {p.kind for p in found} == {"prediction"}
    text = static.PERFORMANCE.read_text(encoding="utf-8")
    assert replaced(text, static.COMMAND, static.table(found), "performance.md") == text
