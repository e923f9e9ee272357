"""Providers of a case: each does the same work or is listed with its reason, and what their checks reject."""

import dataclasses
import functools
import importlib
import sys
from types import ModuleType

import pytest
import torch
from test_benchmarks_timing import planted_case

from benchmarks import asked, llama, modes, peers, run
from benchmarks.case import Claim, is_rival
from benchmarks.cases import lora_linear, training_step
from benchmarks.modes import Work
from benchmarks.peers import Peer
from benchmarks.record import read
from benchmarks.rounding import within_rounding
from benchmarks.timing import AGAIN
from lora_core.kernels import low_rank
from lora_core.kernels.low_rank_matmul import launch_low_rank_matmul

SMALL = {"M": 8, "N": 16, "K": 64, "R": 4, "G": 3}


@pytest.fixture
def uncompiled(monkeypatch):
    """torch.compile takes seconds a graph: it returns what it is given, and is taken to work."""
    monkeypatch.setattr(torch, "compile", lambda layer, **_: layer)
    monkeypatch.setattr(modes, "why_uncompiled", lambda device: "")


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


def test_frozen_base_multiplies_what_the_base_of_a_model_with_adapters_does():
    """Every layer forward, and backward all but those of the first block that read the embedded tokens."""
    found = run.cases_of("training_step", {"M": 32, "K": 64, "R": 4}, "cpu")
    step = next(p.run for case in found for p in case.providers if p.name == training_step.FROZEN)
    with torch.profiler.profile() as profile:
        step()
    products = sum(event.count for event in profile.key_averages() if event.key == "aten::mm")
    layers = len(llama.adapted(llama.llama(64, "cpu"))) + 1
    assert products == 2 * layers - 3


def test_a_backward_that_holds_the_weight_dense_is_listed_with_the_reason(uncompiled):
    case = next(run.cases_of("nf4_lora_linear", {"M": 4, "N": 16, "K": 64, "R": 4}, "cpu"))
    backward = next(c for c in run.cases_of("nf4_lora_linear", case.shape, "cpu") if c.mode == "bwd")
    assert {"reference", "compiled"} <= backward.missing.keys()
    assert not {"reference", "compiled"} & {p.name for p in backward.providers}


@pytest.mark.parametrize(
    ("op", "count", "rivals"),
    [
        ("grouped_lora", 3, {"torch", "torch masked", "compiled"}),
        ("dora_norm", 2, {"torch", "compiled", "compiled algebra"}),
        ("lora_linears", 3, {"torch", "compiled"}),
        ("lora_dropout", 3, {"torch", "peft"}),
        ("nf4_dequantize", 1, {"reference", "compiled"}),
        ("nf4_quantize", 1, {"reference"}),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_every_provider_of_a_case_passes_its_check(op, count, rivals, device, uncompiled):
    """In float32 on the CPU, and as "another device" in bfloat16, as on a GPU."""
    found = list(run.cases_of(op, SMALL, device))
    assert len({(case.mode, case.block_size) for case in found}) == count
    for case in found:
        names = [p.name for p in case.providers]
        assert rivals <= {name for name in names if is_rival(op, case.mode, name, names[0])}
        for name in names:
            outcome = case.check(name)
            assert outcome.passed, (case.mode, case.block_size, name, outcome.reason)


# one head of a rotation is 64 wide
BETWEEN = {"M": 8, "N": 128, "K": 48}


@pytest.mark.parametrize(
    ("op", "rivals", "passes"),
    [
        ("rms_norm", {"torch", "torch rms_norm", "compiled"}, {"fwd": (2, 8 * 128), "bwd": (3, 8 * 128)}),
        ("swiglu", {"torch", "compiled"}, {"fwd": (3, 8 * 48), "bwd": (5, 8 * 48)}),
        ("rotary", {"torch", "compiled"}, {"fwd": (2, 8 * 128), "bwd": (2, 8 * 128)}),
        ("causal_attention", {"torch", "compiled"}, {"fwd": (4, 8 * 128), "bwd": (7, 8 * 128)}),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_every_provider_of_what_stands_between_layers_passes_its_check(op, rivals, passes, device, uncompiled):
    """In float32 on the CPU, and as "another device" in bfloat16; bytes are of the tensors that have to be moved."""
    found = {case.mode: case for case in run.cases_of(op, BETWEEN, device)}
    assert list(found) == list(modes.MODES)
    in_float32 = device == "cpu" or op == "causal_attention"
    size = 4 if in_float32 else 2
    moved = {mode: size * tensors * elements for mode, (tensors, elements) in passes.items()}
    moved["fwdbwd"] = sum(moved.values())
    for mode, case in found.items():
        assert case.bytes_moved == moved[mode] and case.dtype == ("float32" if in_float32 else "bfloat16")
        names = [p.name for p in case.providers]
        assert rivals == {name for name in names if is_rival(op, mode, name, "lora_core")}
        assert case.claims == (Claim(against="torch", no_slower=True),)
        for name in names:
            outcome = case.check(name)
            assert outcome.passed, (mode, name, outcome.reason)


MISTAKEN = {
    "3% too large": lambda run, *given: 1.03 * run(*given),
    # of a product the gradients are right all the same
    "something added": lambda run, x, *rest: run(x, *rest) + 0.1 * x.square(),
    "an operand left out": lambda run, x, *rest: run(x, *(t * 0 for t in rest[:1]), *rest[1:]),
}


@pytest.mark.parametrize("mistake", MISTAKEN)
@pytest.mark.parametrize("op", ["rms_norm", "swiglu", "rotary", "causal_attention"])
@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_a_mistaken_operation_between_layers_does_not_pass_its_check(op, mistake, device, monkeypatch, uncompiled):
    module = importlib.import_module(f"lora_core.ops.{op}")
    monkeypatch.setattr(module, op, functools.partial(MISTAKEN[mistake], getattr(module, op)))
    for case in run.cases_of(op, BETWEEN, device):
        assert not case.check("lora_core").passed, case.mode
        assert case.check("torch").passed, case.mode


def test_layers_of_this_library_one_by_one_are_no_rival(uncompiled):
    case = next(run.cases_of("lora_linears", SMALL, "cpu"))
    names = [p.name for p in case.providers]
    assert [n for n in names if is_rival("lora_linears", "fwd", n, "lora_core")] == ["torch", "compiled"]
    assert case.claims[0].against in names and case.claims[0].against not in ("torch", "compiled")


@pytest.mark.parametrize(
    "op", ["lora_linear", "nf4_lora_linear", "lora_linears", "grouped_lora", "dora_norm", "nf4_dequantize"]
)
def test_without_a_compiler_compiled_layers_are_listed_with_the_reason(op, monkeypatch):
    """As inductor raises where there is no C++ compiler: not when a layer is compiled, but when it first runs."""

    def compile(layer, **_):
        def run_it(*_):
            raise RuntimeError("no C++ compiler")

        return run_it

    modes.why_uncompiled.cache_clear()
    monkeypatch.setattr(torch, "compile", compile)
    try:
        for case in run.cases_of(op, SMALL, "cpu"):
            left_out = "keeps W dense" if (case.op, case.mode) == ("nf4_lora_linear", "bwd") else "no C++ compiler"
            assert left_out in case.missing["compiled"]
            assert not [p.name for p in case.providers if p.name.startswith("compiled")]
    finally:
        modes.why_uncompiled.cache_clear()


@pytest.mark.parametrize("op", ["lora_linear", "nf4_lora_linear"])
def test_unsloth_is_listed_without_a_gpu(op, uncompiled):
    assert all(case.missing["unsloth"] == "needs a GPU" for case in run.cases_of(op, SMALL, "cpu"))


def test_unsloth_is_given_sequences_and_a_scaling_and_the_bias_is_added(monkeypatch):
    """Its function as unsloth/kernels/fast_lora.py has it."""

    class Product:
        @staticmethod
        def apply(x, w, state, a, b, s):
            batch, length, _ = x.shape
            assert state == "state"
            return (x @ w.T + s * (x @ a.T) @ b.T).view(batch, length, -1)

    for name in ("unsloth", "unsloth.kernels", "unsloth.kernels.fast_lora"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["unsloth.kernels.fast_lora"].LoRA_W = Product
    # small whole numbers: every order of summation is exact
    shapes = ((5, 20), (7, 20), (7,), (3, 20), (7, 3))
    x, weight, bias, lora_a, lora_b = (torch.randint(-9, 10, s).double() for s in shapes)
    peer = lora_linear.unsloth_peer(lambda: (weight, "state"), bias, "cuda")
    assert peer.needs == ("unsloth",) and not peer.unfit
    truth = modes.lora_truth(x, weight, bias, lora_a, lora_b, lora_linear.SCALING, None)
    assert torch.equal(peer.make()(x, lora_a, lora_b), truth)


def test_a_missing_provider_is_listed_with_its_reason(tmp_path, monkeypatch, capsys):
    case = dataclasses.replace(planted_case(0.0), missing={"somebody": "is not installed: pip install somebody"})
    monkeypatch.setattr(run, "case_names", lambda: ["planted"])
    monkeypatch.setattr(run, "shapes_of", lambda *_: [{"N": 64}])
    monkeypatch.setattr(run, "cases_of", lambda *_: iter([case]))
    assert run.main(["--samples", "1", "--results", str(tmp_path)]) == 0
    assert "not measured: somebody: is not installed" in " ".join(capsys.readouterr().out.split())


def test_chosen_providers_keep_this_library_and_their_claims():
    case = planted_case(0.0)
    assert [p.name for p in asked.chosen(case, ["nobody"]).providers] == ["lora_core"]
    assert [p.name for p in asked.chosen(case, ["rival"]).providers] == ["lora_core", "rival"]


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
        "unfit": Peer(("torch",), lambda: max, "needs a GPU"),
    }
    works, missing = peers.providers({"lora_core": len}, rivals)
    assert works == {"lora_core": len, "peft": max}
    assert list(missing) == ["torchao", "peft on bitsandbytes", "broken", "unfit"]
    assert "pip install bitsandbytes" in missing["peft on bitsandbytes"]
    assert missing["broken"] == "cannot be built here: IndexError: list index out of range"
    assert missing["unfit"] == "needs a GPU"
    peers.why_missing.cache_clear()


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


WRONG = {
    "1% more of the update": (2.02, 1.0, 0),
    "no update": (0.0, 1.0, 0),
    "no bias": (2.0, 0.0, 0),
    "a tile of columns": (2.0, 1.0, 32),
}


@pytest.mark.parametrize("mode", modes.MODES)
@pytest.mark.parametrize(("m", "n", "k", "r"), [(1, 512, 512, 8), (16, 1024, 1024, 64), (64, 512, 1024, 256)], ids=str)
def test_a_wrong_layer_does_not_pass_its_check_in_half_precision(mode, m, n, k, r):
    """Rounding allows one element more there than an update or a bias is; all of them together it does not."""
    g = torch.Generator().manual_seed(r)
    x, d_y = (torch.randn(m, size, generator=g).bfloat16() for size in (k, n))
    weight, bias, lora_a, lora_b = (
        (torch.randn(s, generator=g) / k**0.5).bfloat16() for s in ((n, k), (n,), (r, k), (n, r))
    )
    leaves = tuple(t.requires_grad_() for t in (x, lora_a, lora_b))

    def layer(scaling, of_bias, lost):
        def run(x, a, b):
            y = x @ weight.T + of_bias * bias + scaling * ((x @ a.T) @ b.T)
            return torch.cat([y[:, :lost] * 0, y[:, lost:]], 1) if lost else y

        return run

    operands = (x, weight, bias, *leaves[1:], 2.0)
    layers = {"right": (2.0, 1.0, 0), **WRONG}
    works = {name: Work(layer(*how), leaves, modes.lora_truth, operands, m + n + k + r) for name, how in layers.items()}
    compare = modes.check(works, mode, d_y)
    found = compare("right")
    assert found.passed, found.reason
    for name in WRONG:
        # no gradient depends on a bias
        assert not compare(name).passed or (name == "no bias" and mode != "fwd"), name


def test_compiled_layers_are_compiled_for_every_shape(monkeypatch):
    """PyTorch runs a function uncompiled after eight graphs: four shapes, with gradients and without."""
    graphs, compile = [], torch.compile

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(modes, "why_uncompiled", lambda device: "")
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
