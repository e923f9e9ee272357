"""What a suite runs, what it leaves out and says so, and what the checks of its cases reject."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_benchmarks_timing import planted_case

from benchmarks import llama, modes, peers, run, shapes, static
from benchmarks.cases import lora_linear
from benchmarks.markers import replaced
from benchmarks.modes import Work
from benchmarks.peers import Peer
from benchmarks.record import read
from benchmarks.rounding import within_rounding
from benchmarks.timing import AGAIN
from lora_core.kernels import low_rank
from lora_core.kernels.low_rank_matmul import launch_low_rank_matmul

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
    assert shapes.cost(large) > 1000 * shapes.cost(small)
    assert shapes.cost({"M": 1024, "K": 1024}) > 4 * shapes.cost({"M": 1024, "K": 256})
    assert 0 < shapes.cost({"R": 16}) <= shapes.cost({"N": 4096, "K": 4096})


@pytest.mark.parametrize("op", ["training_step", "generation_step", "fuse"])
def test_models_in_bfloat16_pass_their_checks_and_a_wrong_scaling_does_not(op, monkeypatch):
    """As on a GPU; bfloat16 alone would hide a scaling 1% off."""
    monkeypatch.setattr(llama, "dtype_of", lambda device: "bfloat16")
    shape = {"M": 2 if op == "generation_step" else 32, "K": 64, "R": 4}
    for case in run.cases_of(op, shape, "cpu"):
        assert case.dtype == "bfloat16" and case.providers
        for provider in case.providers:
            outcome = case.check(provider.name)
            assert outcome.passed, (case.note, case.block_size, provider.name, outcome.reason)
    build = llama.ours

    def off(base, rank, start, four_bit=False):
        model = build(base, rank, start, four_bit)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_b" in name:
                    parameter.mul_(1.01)
        return model

    monkeypatch.setattr(llama, "ours", off)
    if op != "fuse":
        assert not next(run.cases_of(op, shape, "cpu")).check("lora_core").passed


def test_operations_of_a_mixed_batch_are_those_of_rows_with_an_adapter():
    forward = next(run.cases_of("grouped_lora", {"M": 8, "N": 16, "K": 64, "R": 4, "G": 3}, "cpu"))
    # rows 3 and 7 have none; the others adapters 0, 1, 2, 1, 2, 0 of ranks 4, 2, 1
    assert forward.flops == 2 * (16 + 64) * (4 + 2 + 1 + 2 + 1 + 4)


def test_a_backward_that_holds_the_weight_dense_is_listed_with_the_reason():
    case = next(run.cases_of("nf4_lora_linear", {"M": 4, "N": 16, "K": 64, "R": 4}, "cpu"))
    backward = next(c for c in run.cases_of("nf4_lora_linear", case.shape, "cpu") if c.mode == "bwd")
    assert {"reference", "compiled"} <= backward.missing.keys()
    assert not {"reference", "compiled"} & {p.name for p in backward.providers}


@pytest.mark.parametrize("op", ["grouped_lora", "dora_norm"])
def test_every_provider_of_a_case_passes_its_check(op):
    shape = {"M": 8, "N": 16, "K": 64, "R": 4, "G": 3}
    found = list(run.cases_of(op, shape, "cpu"))
    assert len({(case.mode, case.block_size) for case in found}) == {"grouped_lora": 3, "dora_norm": 2}[op]
    for case in found:
        assert all(case.check(p.name).passed for p in case.providers), (case.mode, case.block_size)


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
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "torchao", None)
    assert peers.why_missing("peft") is None
    assert peers.why_missing("torchao") == "torchao is not installed: pip install torchao"
    rivals = {
        "torchao": Peer(("torchao",), lambda: len),
        "peft": Peer(("peft",), lambda: max),
        "peft on bitsandbytes": Peer(("peft", "bitsandbytes"), lambda: max),
        "broken": Peer((), lambda: [][0]),
    }
    works, missing = peers.providers({"lora_core": len}, rivals)
    assert works == {"lora_core": len, "peft": max}
    assert list(missing) == ["torchao", "peft on bitsandbytes", "broken"]
    assert "pip install bitsandbytes" in missing["peft on bitsandbytes"]
    assert missing["broken"] == "cannot be built here: IndexError: list index out of range"
    peers.why_missing.cache_clear()


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
machine.rates = lambda device, dtype: (1e9, 1e9)
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


def raising_case(name, when):
    """A case in which a provider raises while it is checked or timed."""
    case, calls = planted_case(0.0), []

    def run_out():
        calls.append(name)
        # the check calls nothing; the peak memory is the first run
        if when == "timed" and len(calls) > 1 or when == "measured":
            raise torch.OutOfMemoryError("no memory [left]")
        return torch.ones(64)

    def check(asked):
        if asked == name and when == "checked":
            raise RuntimeError("no such device")
        return case.check(asked)

    providers = [dataclasses.replace(p, run=run_out) if p.name == name else p for p in case.providers]
    return dataclasses.replace(case, providers=providers, check=check)


@pytest.mark.parametrize("when", ["checked", "measured", "timed"])
@pytest.mark.parametrize("name", ["lora_core", "rival"])
def test_a_provider_that_raises_is_listed_and_the_others_are_measured(name, when, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "case_names", lambda: ["planted"])
    monkeypatch.setattr(run, "shapes_of", lambda *_: [{"N": 64}])
    monkeypatch.setattr(run, "cases_of", lambda *_: iter([raising_case(name, when)]))
    assert run.main(["--suite", "cpu", "--samples", "2", "--results", str(tmp_path)]) == run.FAILED
    said = " ".join(capsys.readouterr().out.split())
    wanted = "RuntimeError: no such device" if when == "checked" else "OutOfMemoryError: no memory [left]"
    assert f"{name} raised and was not timed: {wanted}" in said
    rows = list(read(tmp_path / "planted.jsonl"))
    other = {"lora_core": "rival", "rival": "lora_core"}[name]
    assert {r.provider.removesuffix(AGAIN) for r in rows} == {other} and all(r.samples == 2 for r in rows)


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


def test_compiled_layers_are_compiled_for_every_shape(monkeypatch):
    """PyTorch runs a function uncompiled after eight graphs: four shapes, with gradients and without."""
    graphs, compile = [], torch.compile

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda layer, **options: compile(layer, backend=backend, **options))
    for m in range(2, 8):
        before = len(graphs)
        for case in lora_linear.cases({"M": m, "N": 8, "K": 8, "R": 2}, "cpu"):
            assert case.check("compiled").passed
        assert len(graphs) - before == 2, f"the shape number {m - 1}"


def test_both_paths_of_the_forward_can_be_forced_and_are_right(monkeypatch):
    taken = []
    # on the library's path the kernel makes the update and the bias alone, of no columns of x
    monkeypatch.setattr(
        low_rank, "launch_low_rank_matmul", lambda x, *a: taken.append(x.shape[1]) or launch_low_rank_matmul(x, *a)
    )
    x, weight, bias, lora_a, lora_b = (torch.randn(s) for s in ((5, 20), (7, 20), (7,), (3, 20), (7, 3)))
    runs = lora_linear.forced_paths(weight, bias)
    assert list(runs) == ["lora_core fused", "lora_core library"]
    wide = [t.double() for t in (x, weight, bias, lora_a, lora_b)]
    truth, magnitude = (
        modes.lora_truth(*(t.abs() if absolute else t for t in wide), lora_linear.SCALING, None)
        for absolute in (False, True)
    )
    for run_path in runs.values():
        assert within_rounding(run_path(x, lora_a, lora_b), truth, magnitude, 20 + 3 + 2, roundings=4).passed
    assert taken == [20, 0]


def test_a_compiled_layer_that_would_run_uncompiled_raises():
    modes.compiled(torch.neg)
    layer = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    with pytest.raises(Exception, match="recompile_limit"):
        for size in range(2, 20):
            layer(torch.ones(size))
    torch._dynamo.reset()


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
