"""What a suite runs, and what it leaves out and says so."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_benchmarks_timing import planted_case

from benchmarks import run, shapes
from benchmarks.record import read
from benchmarks.timing import AGAIN

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


def test_large_shapes_count_for_more_of_a_suite_than_small_ones():
    small, large = {"M": 1, "N": 512, "K": 512, "R": 16}, {"M": 8192, "N": 28672, "K": 8192, "R": 16}
    assert shapes.cost(large) > 30 * shapes.cost(small)
    assert shapes.cost({"M": 1024, "K": 1024}) > 4 * shapes.cost({"M": 1024, "K": 256})
    assert 0 < shapes.cost({"R": 16}) <= shapes.cost({"N": 4096, "K": 4096})


def test_gpu_suite_without_a_gpu_says_so(capsys, monkeypatch):
    monkeypatch.setattr(run, "_has_gpu", lambda: False)
    assert run.main(["--suite", "gpu", "--op", "nf4_quantize"]) == run.FAILED
    assert "needs a CUDA device" in capsys.readouterr().err


# the smallest sizes that every case takes
TINY = {
    **dict.fromkeys(("fuse", "training_step"), "M=32,K=64,R=4"),
    "generation_step": "M=1,K=64,R=4",
    "grouped_lora": "M=8,N=16,K=16,R=4,G=3",
    "inject": "R=4",
    "roof": "N=16,K=16",
    **dict.fromkeys(("absmax_quantize", "absmax_dequantize"), "64x64"),
}


BLOCKED_RUN = """
import importlib.machinery, sys

found, blocked = importlib.machinery.PathFinder.find_spec, sys.argv[1].split(",")
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, path=None, target=None: None if name.split(".")[0] in blocked else found(name, path, target)
)
import torch

torch.set_num_threads(1)
from benchmarks import machine, measure, run, shapes
from benchmarks.timing import interleave

# not what this is about, and slow: a whole Llama, the machine's rates, a cold cache, and compiling
shapes.LLAMA_2_7B["num_hidden_layers"] = 1
machine.copy_rate, machine.matmul_rate = lambda device: 1e9, lambda device, dtype: 1e9
measure.interleave = lambda *arguments, **options: interleave(*arguments, **options, flush_bytes=0)
torch.compile = lambda function, **_: function
for op, shape in (pair.split(":") for pair in sys.argv[3:]):
    code = run.main(["--suite", "cpu", "--op", op, "--shape", shape, "--samples", "1", "--results", sys.argv[2]])
    print(f"{op} done", flush=True)
"""


@pytest.mark.parametrize(
    ("blocked", "left_out", "ops"),
    [
        ("bitsandbytes", {"peft on bitsandbytes", "bitsandbytes", "bitsandbytes 8-bit AdamW"}, ()),
        ("peft,numba", {"peft", "peft on bitsandbytes"}, ("fuse", "generation_step", "inject", "lora_linear")),
        ("transformers,torchao", {"all of it"}, ("fuse", "inject", "lora_linear", "training_step")),
    ],
)
def test_suite_runs_to_its_end_without_a_package(blocked, left_out, ops, tmp_path):
    """In a process where it cannot be imported, on tiny shapes: every case, or those that take the package."""
    jobs = [f"{op}:{TINY.get(op, 'M=8,N=64,K=64,R=4')}" for op in ops or run.case_names()]
    command = [sys.executable, "-c", BLOCKED_RUN, blocked, str(tmp_path), *jobs]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = " ".join(done.stdout.split())
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(" done\n") == len(jobs)
    assert "raised" not in said and "failed its check" not in said, done.stdout[-6000:]
    for name in left_out:
        assert f"not measured: {name}: {blocked.split(',')[0]} is not installed" in said
    rows = [row for path in tmp_path.glob("*.jsonl") for row in read(path)]
    assert "lora_linear" in {row.op for row in rows if row.provider == "lora_core"}
    assert not {row.provider for row in rows} & left_out


def test_a_case_that_raises_does_not_end_the_suite(tmp_path, monkeypatch, capsys):
    def cases(op, shape, device):
        if shape == {"N": 1}:
            raise torch.OutOfMemoryError("no memory")
        yield planted_case(0.0)

    monkeypatch.setattr(run, "case_names", lambda: ["planted"])
    monkeypatch.setattr(run, "shapes_of", lambda *_: [{"N": 1}, {"N": 64}])
    monkeypatch.setattr(run, "cases_of", cases)
    assert run.main(["--suite", "cpu", "--samples", "1", "--results", str(tmp_path)]) == run.FAILED
    said = " ".join(capsys.readouterr().out.split())
    assert "1 of 2 raised and were left: planted N=1: OutOfMemoryError: no memory" in said
    assert {r.provider for r in read(tmp_path / "planted.jsonl")} == {"lora_core", "rival", "lora_core" + AGAIN}
