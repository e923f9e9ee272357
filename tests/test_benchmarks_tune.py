"""The tool that times candidate configurations: its candidates are right, and it leaves the kernels as they were."""

import pytest
import torch

from benchmarks import tune
from lora_core.kernels import nf4_matmul

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("part", tune.PARTS)
def test_candidates_are_right_and_change_nothing_for_good(part, capsys):
    before = (nf4_matmul.TILE, nf4_matmul.WARPS, dict(nf4_matmul.STAGES))
    _, truth, runs = next(tune.PARTS[part](64, 256, DEVICE))
    # the last of them is a candidate of each kind's own
    for name in (*list(runs)[:2], list(runs)[-1]):
        assert tune._sound(name, runs[name], truth), capsys.readouterr().out
    assert before == (nf4_matmul.TILE, nf4_matmul.WARPS, nf4_matmul.STAGES)


def test_wrong_candidates_are_named(capsys):
    truth = torch.ones(3)
    assert not tune._sound("doubled", lambda: 2 * truth, truth)
    assert "doubled: wrong by 1" in capsys.readouterr().out


def test_tune_refuses_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2 and "no GPU" in capsys.readouterr().err
