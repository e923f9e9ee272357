"""What a run cannot measure is said before it measures anything."""

import dataclasses

import pytest
from test_benchmarks_timing import planted_case

from benchmarks import run, static


def refused(capsys, monkeypatch, *arguments):
    """Return what is said of a run that measures nothing."""
    monkeypatch.setattr(run, "measure", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(static, "main", lambda *_: pytest.fail("predicted"))
    with pytest.raises(SystemExit) as stop:
        run.main(list(arguments))
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--op", "lora_linear", "--shape", "64x64"), "--shape N=64,K=64 lacks M, R of lora_linear: give all sizes"),
        (("--op", "inject", "--op", "fuse", "--shape", "M=8"), "lacks R of inject; K, R of fuse"),
        (("--sweep", "M", "--op", "nf4_quantize"), "--sweep M is of lora_linear, not of nf4_quantize"),
        (("--sweep", "M", "--shape", "64x64"), "--sweep M has shapes of its own: leave out --shape"),
        (("--op", "roof", "--seed", "-1"), "want a whole number of at least 0"),
        (("--op", "roof", "--shape", "K=64,K=32"), "gives K twice"),
        (("--op", "roof", "--results", __file__), "is a file; want a folder"),
        (("--op", "dora_norm", "--shape", "N=8,K=8,R=2", "--mode", "bwd"), "nothing would be measured; there is fwd"),
        (("--op", "roof", "--shape", "K=64", "--provider", "typo"), "--provider typo: no comparison has it; there are"),
    ],
)
def test_a_run_refuses_what_it_cannot_measure(arguments, said, capsys, monkeypatch):
    assert said in refused(capsys, monkeypatch, "--suite", "cpu", *arguments)


@pytest.mark.parametrize(
    "option", ["--shape=8x8", "--sweep=M", "--mode=fwd", "--provider=x", "--samples=3", "--seed=1"]
)
def test_the_static_suite_refuses_options_about_measuring(option, capsys, monkeypatch):
    said = refused(capsys, monkeypatch, "--suite", "static", option)
    assert f"leave out {option.split('=')[0]}; it takes" in said


def test_the_static_suite_names_the_operations_without_kernels(capsys, monkeypatch):
    said = refused(capsys, monkeypatch, "--suite", "static", "--op", "roof", "--op", "fuse", "--op", "dora_norm")
    assert "--op roof, fuse: there is no kernel to predict for" in said
    assert "--kernel" not in said and "predicts for absmax_dequantize, absmax_quantize, dora_norm, grouped_lora" in said


def test_the_static_suite_is_told_the_folder_of_its_rows(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(static, "main", lambda arguments, program: asked.append(arguments) or 0)
    assert run.main(["--suite", "static", "--results", str(tmp_path)]) == 0
    assert run.main(["--suite", "static", "--op", "nf4_quantize"]) == 0
    assert asked == [["--results", str(tmp_path)], ["--kernel", "nf4_quantize"]]


def measured_of(monkeypatch, tmp_path, cases, *arguments):
    """Return the mode and providers of every case that a run of these comes to measure."""
    found = []
    monkeypatch.setattr(run, "case_names", lambda: ["planted"])
    monkeypatch.setattr(run, "shapes_of", lambda *_: [{"N": 64}, {"N": 32}])
    monkeypatch.setattr(run, "cases_of", cases)
    monkeypatch.setattr(run, "measure", lambda case, *_: found.append((case.mode, len(case.providers))) or True)
    code = run.main(["--suite", "cpu", "--results", str(tmp_path), *arguments])
    return code, found


def test_a_provider_that_is_missing_here_or_raises_while_it_is_built_is_no_unknown_one(tmp_path, monkeypatch):
    missing = dataclasses.replace(planted_case(0.0), missing={"somebody": "is not installed"})
    asked = measured_of(monkeypatch, tmp_path, lambda *_: iter([missing]), "--provider", "somebody")
    assert asked == (0, [("fwd", 1), ("fwd", 1)])

    def raising(*_):
        raise RuntimeError("no memory")

    assert measured_of(monkeypatch, tmp_path, raising, "--provider", "rival") == (run.FAILED, [])


def test_a_benchmark_that_cannot_run_here_says_so_in_every_mode(tmp_path, monkeypatch):
    nothing = dataclasses.replace(planted_case(0.0), providers=[], missing={"all of it": "is not installed"})
    asked = measured_of(monkeypatch, tmp_path, lambda *_: iter([nothing]), "--mode", "bwd", "--provider", "rival")
    assert asked == (0, [("fwd", 0), ("fwd", 0)])


def test_a_provider_of_another_mode_is_refused(tmp_path, monkeypatch, capsys):
    forward = planted_case(0.0)
    backward = dataclasses.replace(forward, mode="bwd", providers=forward.providers[:1])
    cases = [forward, backward]
    assert measured_of(monkeypatch, tmp_path, lambda *_: iter(cases), "--mode", "bwd") == (0, [("bwd", 1)] * 2)
    with pytest.raises(SystemExit):
        measured_of(monkeypatch, tmp_path, lambda *_: iter(cases), "--mode", "bwd", "--provider", "rival")
    assert "--provider rival: no comparison has it; there are lora_core" in capsys.readouterr().err
