"""What a suite runs, what it leaves out and says so, and what the checks of its cases reject."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_benchmarks_timing import planted_case

from benchmarks import modes, peers, run, shapes, static
from benchmarks.markers import replaced
from benchmarks.modes import Work

ROOT = Path(__file__).resolve().parent.parent


def test_every_case_has_shapes_for_both_suites():
    for op in run.case_names():
        for suite in ("cpu", "gpu"):
            assert run.shapes_of(op, None, suite), (op, suite)
    assert run.shapes_of("nf4_quantize", None, "gpu") == shapes.GPU_WEIGHTS
    assert run.shapes_of("nf4_quantize", [{"N": 2, "K": 2}], "gpu") == [{"N": 2, "K": 2}]


def test_gpu_suite_covers_the_shapes_of_both_models():
    found = {(s["N"], s["K"]) for s in shapes.LLAMA_3_LINEARS}
    assert {(4096, 4096), (14336, 4096), (8192, 8192), (28672, 8192), (8192, 28672)} <= found
    assert {s["M"] for s in shapes.LLAMA_3_LINEARS} == {1, 16, 64, 512, 4096, 8192}
    assert {s["R"] for s in shapes.LLAMA_3_LINEARS} == {8, 16, 64, 256}


def test_tables_list_suites_and_no_sweeps():
    assert shapes.swept_only("lora_linear", {"N": 512, "K": 512, "R": 16, "M": 4})
    assert shapes.swept_only("training_step", {"M": 256, "K": 64})
    assert not shapes.swept_only("lora_linear", {"M": 16, "N": 512, "K": 512, "R": 16})
    assert not shapes.swept_only("training_step", {"M": 1024, "K": 256})
    assert not shapes.swept_only("lora_linear", {"M": 3, "N": 5, "K": 7, "R": 2})


@pytest.mark.parametrize("name", shapes.SWEEPS)
def test_sweeps_vary_one_dimension(name):
    for suite in ("cpu", "gpu"):
        points = shapes.sweep(name, suite)
        assert len({op for op, _ in points}) == 1 and len(points) >= 5
        assert len({tuple((k, v) for k, v in shape.items() if k != name) for _, shape in points}) == 1
        sizes = [shape[name] for _, shape in points]
        assert sizes == sorted(set(sizes))


def test_gpu_suite_without_a_gpu_says_so(capsys, monkeypatch):
    monkeypatch.setattr(run, "_has_gpu", lambda: False)
    assert run.main(["--suite", "gpu", "--op", "nf4_quantize"]) == run.FAILED
    assert "needs a CUDA device" in capsys.readouterr().err


def test_a_missing_provider_is_listed_with_its_reason(tmp_path, monkeypatch, capsys):
    case = dataclasses.replace(planted_case(0.0), missing={"somebody": "is not installed: pip install somebody"})
    monkeypatch.setattr(run, "case_names", lambda: ["planted"])
    monkeypatch.setattr(run, "shapes_of", lambda *_: [{"N": 64}])
    monkeypatch.setattr(run, "cases_of", lambda *_: iter([case]))
    assert run.main(["--samples", "1", "--results", str(tmp_path)]) == 0
    assert "not measured: somebody: is not installed" in " ".join(capsys.readouterr().out.split())


def test_chosen_providers_keep_this_library_and_their_claims(tmp_path):
    case = planted_case(0.0)
    assert [p.name for p in run._chosen(case, ["nobody"]).providers] == ["lora_core"]
    assert [p.name for p in run._chosen(case, ["rival"]).providers] == ["lora_core", "rival"]


def test_peers_that_cannot_run_are_given_a_reason(monkeypatch):
    peers.why_missing.cache_clear()
    assert "needs a GPU" in peers.why_missing("unsloth", "cpu")
    assert peers.why_missing("peft", "cpu") is None
    monkeypatch.setitem(sys.modules, "torchao", None)
    assert "pip install torchao" in peers.why_missing("torchao", "cpu")
    works, missing = peers.providers(
        {"lora_core": len}, {"torchao": lambda: len, "peft on bitsandbytes": lambda: max}, "cpu"
    )
    assert works == {"lora_core": len, "peft on bitsandbytes": max} and list(missing) == ["torchao"]
    peers.why_missing.cache_clear()


@pytest.mark.parametrize("mode", modes.MODES)
def test_a_layer_1_percent_off_does_not_pass_its_check(mode):
    x, weight, bias, lora_a, lora_b, d_y = (
        torch.randn(s, generator=torch.Generator().manual_seed(0))
        for s in ((64, 48), (40, 48), (40,), (8, 48), (40, 8), (64, 40))
    )
    leaves = tuple(t.requires_grad_() for t in (x, lora_a, lora_b))

    def layer(factor):
        return lambda x, a, b: x @ weight.T + bias + factor * 2.0 * (x @ a.T) @ b.T

    works = {
        name: Work(layer(factor), leaves, modes.lora_truth, (x, weight, bias, *leaves[1:], 2.0), 48 + 8 + 64 + 40)
        for name, factor in (("right", 1.0), ("wrong", 1.01))
    }
    compare = modes.check(works, mode, d_y)
    assert compare("right").passed and not compare("wrong").passed


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


def test_predictions_in_the_documentation_are_those_on_record():
    import json

    lines = (ROOT / "benchmarks" / "results" / "static" / "predictions.jsonl").read_text().splitlines()
    found = [static.Prediction(**json.loads(line)) for line in lines]
    assert {p.kind for p in found} == {"prediction"}
    text = static.PERFORMANCE.read_text(encoding="utf-8")
    assert replaced(text, static.COMMAND, static.table(found), "performance.md") == text
