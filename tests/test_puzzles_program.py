"""`lora-core puzzles`: the list, the hints, the files it starts, and bad input."""

import dataclasses
import os
from pathlib import Path

import pytest
from puzzled import edited, said_of, solution

from lora_core.cli import main as program
from lora_core.errors import ConfigError
from lora_core.puzzles import catalogue
from lora_core.puzzles.catalogue import PUZZLES, find_puzzle, stub
from lora_core.puzzles.run import WRONG, check_file


def test_puzzles_are_numbered_and_have_a_file_and_hints():
    assert [puzzle.number for puzzle in PUZZLES] == list(range(1, len(PUZZLES) + 1))
    assert sorted(p.name for p in catalogue.CHECKOUT.glob("*.py")) == [puzzle.file for puzzle in PUZZLES]
    assert all(len(puzzle.hints) == 3 for puzzle in PUZZLES)
    # a stub gives nothing of its solution away: what is in both is what the exercise gives
    for puzzle in PUZZLES:
        given = stub(puzzle).read_text("utf-8")
        assert f"def {puzzle.function}(" in given
        assert "NotImplementedError" in given or "    pass\n" in given


@pytest.mark.parametrize(("given", "wanted"), [(0, "1 to 13"), (14, "1 to 13")])
def test_puzzles_unknown_number_is_refused(given, wanted):
    with pytest.raises(ConfigError, match=wanted):
        find_puzzle(given)


def test_puzzles_program_lists_hints_and_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    program(["puzzles"])
    listed = capsys.readouterr().out
    assert all(puzzle.title in listed for puzzle in PUZZLES)
    program(["puzzles", "hint", "5", "--level", "3"])
    assert capsys.readouterr().out.strip() == find_puzzle(5).hints[2]
    program(["puzzles", "start", "mine"])
    mine = tmp_path / "mine" / find_puzzle(1).file
    assert mine.read_text("utf-8") == stub(find_puzzle(1)).read_text("utf-8")
    mine.write_text("my work")
    program(["puzzles", "start", "mine"])
    assert mine.read_text() == "my work"


def test_puzzles_file_that_is_not_written_is_named_with_its_folder(tmp_path, capsys):
    path = edited(find_puzzle(1), "    return", "    raise NotImplementedError\n    return", tmp_path)
    assert f"{path} is not written yet" in said_of(find_puzzle(1), path, capsys)[1]


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_puzzles_check_says_what_a_file_raises_in_any_letters(encoding, tmp_path, monkeypatch):
    """The check's process writes in one encoding, whatever this one's and the system's are."""
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    path = tmp_path / "letters.py"
    path.write_text("def lora_forward(*a):\n    raise ValueError('größe 層')\n", encoding="utf-8")
    solved, said = check_file(find_puzzle(1), path)
    assert not solved and "größe 層" in said


def test_puzzles_interrupted_check_ends_without_a_traceback(tmp_path, capsys):
    path = tmp_path / "interrupted.py"
    path.write_text("def lora_forward(*a):\n    raise KeyboardInterrupt\n")
    assert said_of(find_puzzle(1), path, capsys) == (WRONG, "the check of interrupted.py was interrupted\n")


def test_puzzles_program_checks_the_file_here(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    puzzle = find_puzzle(3)
    (tmp_path / puzzle.file).write_text(solution(puzzle).read_text("utf-8"), "utf-8")
    program(["puzzles", "check", "3"])
    assert capsys.readouterr().out == "ok   3  solved: NF4 unpack\n"
    edited(puzzle, "[:n]", "", tmp_path)
    with pytest.raises(SystemExit) as ended:
        program(["puzzles", "check", "3"])
    assert ended.value.code == 1 and capsys.readouterr().out.startswith("no   3  n = 7: you returned 8 codes")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["solve"], "want one of list, start, hint, check"),
        (["check"], "want the number of an exercise, 1 to 13"),
        (["check", "forward"], "want the number of an exercise, 1 to 13"),
        (["check", "99"], "there is no exercise 99"),
        (["check", "\u00b2"], "want the number of an exercise, 1 to 13"),
        (["check", "1" * 5000], "want the number of an exercise, 1 to 13"),
        (["start", os.devnull], "want a folder, new or not, that can be written"),
        (["hint", "1", "--level", "9"], "hints of level 1 to 3"),
        (["check", "1", "--file", "nowhere.py"], "nowhere.py is no file"),
        # the exercises as they came are nobody's solution
        (["check", "1"], "01-lora-forward.py is no file here: want the one with your solution, in the folder"),
        (["check", "abc"], "1 to 13, or all"),
    ],
)
def test_puzzles_program_refuses_bad_input(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        program(["puzzles", *arguments])
    assert ended.value.code == 2 and says in capsys.readouterr().err


def test_puzzles_program_finds_the_exercises_of_a_checkout(capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    with pytest.raises(SystemExit) as ended:
        program(["puzzles", "check", "1"])
    assert ended.value.code == 1 and "is not written yet" in capsys.readouterr().out


def test_puzzles_is_a_frozen_catalogue():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PUZZLES[0].number = 2
