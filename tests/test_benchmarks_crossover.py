"""The tool that measures where a fused product beats a library's: it times what is right, and loses no measurement."""

import json

import pytest
import torch
from test_kernels_crossover import row

from benchmarks import crossover as tool
from benchmarks.case import CheckError
from lora_core.kernels import crossover, lora_linear

SMALL = "M=3,N=17,K=20,R=2"


def test_crossover_tool_measures_both_paths_and_keeps_other_devices(tmp_path, capsys):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    output = tmp_path / "found.json"
    output.write_text(json.dumps([row(16, 1.0, 2.0)]))
    arguments = ["--device", device, "--shape", SMALL, "--dtype", "float32", "--samples", "1", "--output", str(output)]
    for _ in range(2):
        assert tool.main(arguments) == 0
    assert "float32 M=3 N=17 K=20 R=2: fused" in capsys.readouterr().out
    found = {m.device: m for m in crossover.read(output)}
    assert len(found) == 2 and found["chip"].faster == "fused"
    mine = found[crossover.device_name(torch.device(device))]
    assert (mine.m, mine.n, mine.k, mine.r) == (3, 17, 20, 2) and min(mine.fused_ms, mine.library_ms) > 0


def test_crossover_tool_does_not_time_a_wrong_result(monkeypatch, tmp_path):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    right = lora_linear.launch_lora_linear
    monkeypatch.setattr(lora_linear, "launch_lora_linear", lambda *a: (right(*a)[0] * 1.01, None))
    with pytest.raises(CheckError, match="times the rounding bound off"):
        tool.measure("float32", {"M": 3, "N": 17, "K": 20, "R": 2}, device, 1)


@pytest.mark.parametrize("failure", [CheckError("off"), torch.cuda.OutOfMemoryError("full")], ids=repr)
def test_crossover_tool_goes_on_after_a_shape_that_it_cannot_measure(failure, tmp_path, monkeypatch, capsys):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    measured = tool.measure

    def measure(dtype, shape, *rest):
        if shape["M"] == 4:
            raise failure
        return measured(dtype, shape, *rest)

    monkeypatch.setattr(tool, "measure", measure)
    output = tmp_path / "found.json"
    arguments = ["--device", device, "--dtype", "float32", "--samples", "1", "--output", str(output)]
    assert tool.main([*arguments, "--shape", SMALL.replace("M=3", "M=4"), "--shape", SMALL]) == 1
    assert [m.m for m in crossover.read(output)] == [3]
    assert f"float32 M=4 N=17 K=20 R=2 not measured: {failure}" in capsys.readouterr().err


def test_crossover_tool_refuses_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tool.main([]) == 2 and "no GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--shape", "foo"), "shape 'foo' is not understood; write M=1024"),
        (("--shape", "64x64"), "--shape N=64,K=64 lacks M, R: want M=512"),
        (("--samples", "0"), "'0'; want a whole number of at least 1"),
    ],
)
def test_crossover_tool_says_what_is_wrong_with_an_option(options, said, capsys):
    with pytest.raises(SystemExit) as stop:
        tool.main(list(options))
    assert stop.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("held", [json.dumps([row(16, 1.0, 2.0) | {"note": "x"}]), "no json"])
def test_crossover_tool_leaves_a_file_that_it_cannot_read(held, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(tool, "measure", lambda *_: pytest.fail("measured what cannot be written"))
    output = tmp_path / "found.json"
    output.write_text(held)
    assert tool.main(["--device", "cpu", "--output", str(output)]) == 2
    said = capsys.readouterr().err
    assert f"{output} cannot be read" in said and "another --output" in said
    with pytest.raises(tool.KeptError):
        tool.write(output, [])
    assert output.read_text() == held


def test_crossover_tool_measures_nothing_for_a_folder_that_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(tool, "measure", lambda *_: pytest.fail("measured what cannot be written"))
    assert tool.main(["--device", "cpu", "--output", str(tmp_path / "no" / "found.json")]) == 2
    assert f"there is no folder {tmp_path / 'no'}" in capsys.readouterr().err
