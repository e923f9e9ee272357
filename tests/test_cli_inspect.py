"""`lora-core inspect` at the terminal: exit status, JSON, and nothing a file could steer it with."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from inspected import CONFIGURATION, exit_status, write_adapter
from safetensors.torch import save_file
from torch import nn

import lora_core as lc
from lora_core.adapt.files import CONFIG, WEIGHTS
from lora_core.adapt.save import save_adapter
from lora_core.cli import main
from lora_core.commands.inspect import SHOWN_ROWS


def test_inspect_says_that_an_adapter_was_never_trained(tmp_path, capsys):
    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16))
    lc.add_adapter(model, lc.LoraConfig(r=4, target_modules=["0"]))
    save_adapter(model, tmp_path / "fresh")
    assert exit_status("inspect", str(tmp_path / "fresh")) == 1
    assert "adapter never trained" in capsys.readouterr().out


def test_inspect_json_is_json_even_with_a_nan(tmp_path, capsys):
    write_adapter(tmp_path, up__lora_A=torch.full((4, 16), math.nan))
    assert exit_status("inspect", str(tmp_path), "--json") == 1
    values = json.loads(capsys.readouterr().out)
    assert values["kind"] == "adapter"
    assert {p["module"]: p["update_norm"] for p in values["pairs"]}["up"] is None


@pytest.mark.parametrize("rows", [SHOWN_ROWS, SHOWN_ROWS + 1])
def test_inspect_says_how_many_rows_it_leaves_out_where_it_does(tmp_path, rows, capsys):
    save_file({f"row{i:02}": torch.ones(1) for i in range(rows)}, tmp_path / "many.safetensors")
    for options, left in (((), rows - SHOWN_ROWS), (("--all",), 0)):
        assert exit_status("inspect", str(tmp_path / "many.safetensors"), *options) == 0
        shown = capsys.readouterr().out
        assert sum(f"row{i:02}" in shown for i in range(rows)) == rows - left
        assert (f"... and {left} more; --all shows them" in shown) is (left > 0)
        assert shown.count("more; --all") == (left > 0)


def test_inspect_escapes_what_the_encoding_of_the_output_lacks(tmp_path):
    """As that of a pipe on Windows."""
    folder = tmp_path / "größe"
    folder.mkdir()
    write_adapter(folder, {**CONFIGURATION, "base_model_name_or_path": "層"})
    command = [sys.executable, "-m", "lora_core", "inspect", str(folder)]
    run = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert r"gr\xf6\xdfe" in run.stdout and r"\u5c64" in run.stdout


@pytest.mark.parametrize("columns", ["40", "120"])
def test_inspect_lets_no_file_steer_the_terminal(tmp_path, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    harm = "\x1b]0;x\x07\x9b2J\ud800\r"
    write_adapter(tmp_path, {**CONFIGURATION, "task_type": None, "base_model_name_or_path": harm, harm: harm})
    save_file(
        {f"base_model.model.{harm[:6]}.lora_A.weight": torch.ones(4, 16), "x\x1b[2J": torch.ones(2)}, tmp_path / WEIGHTS
    )
    assert exit_status("inspect", str(tmp_path)) == 1
    shown = capsys.readouterr().out
    assert r"\x1b]0;x\x07\x9b2J\ud800\r" in "".join(shown.split())
    assert all(c.isprintable() or c == "\n" for c in shown)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": harm}))
    exit_status("inspect", str(tmp_path))
    assert all(c.isprintable() or c == "\n" for c in "".join(capsys.readouterr()))


def test_program_ends_with_a_line_where_its_output_is_full(tmp_path):
    write_adapter(tmp_path)
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "lora_core", "inspect", str(tmp_path)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "lora-core: no space left on device\n")


def test_program_interrupted_while_it_loads_ends_with_a_line(monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_core.cli.importlib.import_module", interrupted)
    assert exit_status("memory") == 130
    assert capsys.readouterr().err == "lora-core: interrupted\n"


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("hello")])
def test_inspect_says_what_it_wants_instead(tmp_path, make, capsys):
    path = tmp_path / "thing"
    make(path)
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(path)])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "CheckpointError" in message
    assert "thing" in message
