"""`lora-core bench` passes its options on, and refuses what cannot be measured in its own name."""

import pytest

from benchmarks import run
from lora_core import cli


def refusal(capsys, call, *arguments):
    with pytest.raises(SystemExit) as stop:
        call(list(arguments))
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize("samples", ["0", "-1"])
def test_bench_refuses_to_take_no_samples(samples, capsys):
    for call, arguments in ((run.main, []), (cli.main, ["bench"])):
        code, told = refusal(capsys, call, *arguments, "--samples", samples)
        assert code == 2 and samples in told


@pytest.mark.parametrize("arguments", [("--op", "nothing"), ("--samples", "0"), ("--suite", "static", "--op", "roof")])
def test_bench_calls_itself_by_its_own_name(arguments, capsys):
    code, told = refusal(capsys, cli.main, "bench", *arguments)
    assert code == 2 and "lora-core bench: error" in told and "benchmarks." not in told


def test_bench_without_a_gpu_refuses_the_suite_for_one(capsys, monkeypatch):
    monkeypatch.setattr(run, "_has_gpu", lambda: False)
    code, told = refusal(capsys, cli.main, "bench", "--suite", "gpu")
    assert code == 1 and told.startswith("lora-core bench: the gpu suite needs a CUDA device")


def test_bench_takes_every_option_of_the_benchmarks(capsys, monkeypatch):
    given = []
    monkeypatch.setattr(run, "main", lambda arguments, program: given.append((arguments, program)) or 0)
    options = ["--op", "roof", "--shape", "8x8", "--shape", "M=1", "--provider", "peft", "--seed", "3", "--help"]
    cli.main(["bench", *options])
    assert given == [(options, "lora-core bench")]
