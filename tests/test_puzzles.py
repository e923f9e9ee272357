"""Checking an exercise: solutions pass, stubs, broken and endless files fail with a message that says why."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from puzzled import edited, said_of, solution

from lora_core.puzzles.catalogue import PUZZLES, find_puzzle, stub
from lora_core.puzzles.run import SOLVED, WRONG, check_file


@pytest.mark.parametrize("puzzle", PUZZLES, ids=lambda puzzle: puzzle.name)
def test_puzzles_solution_is_accepted(puzzle, capsys):
    assert said_of(puzzle, solution(puzzle), capsys) == (SOLVED, f"solved: {puzzle.title}\n")


@pytest.mark.parametrize("puzzle", PUZZLES, ids=lambda puzzle: puzzle.name)
def test_puzzles_stub_names_the_function_and_is_refused(puzzle, capsys):
    status, said = said_of(puzzle, stub(puzzle), capsys)
    assert status == WRONG and ("not written yet" in said or "wrote nothing: is its body still empty?" in said)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def lora_forward(:\n", "line 1: invalid syntax"),
        ("import no_such_thing\n", "needs no_such_thing, which is not installed"),
        ("x = 1\n", "has no lora_forward: keep the name"),
        ("raise SystemExit(0)\n", "ends the program"),
        ("1 / 0\n", "ZeroDivisionError: division by zero"),
        ("\x00", "source code"),
    ],
)
def test_puzzles_broken_file_is_explained_in_a_line(text, says, tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(text)
    status, said = said_of(find_puzzle(1), path, capsys)
    assert status == WRONG and says in said, said


def test_puzzles_endless_loop_is_given_up(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("while True: pass\n")
    assert check_file(find_puzzle(1), path, limit_s=5) == (
        False,
        "mine.py was still running after 5 s: is there a loop without an end?",
    )


@pytest.mark.parametrize("ending", ["os._exit(0)", "os.kill(os.getpid(), 9)"])
def test_puzzles_file_that_ends_the_check_is_not_taken_for_solved(ending, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(f"import os\n{ending}\n")
    solved, said = check_file(find_puzzle(1), path)
    assert not solved and "broke off with exit status" in said


def test_puzzles_what_the_file_prints_stays_out_of_the_verdict(tmp_path):
    puzzle = find_puzzle(1)
    path = edited(puzzle, "    return", "    print('solved: nothing')\n    return", tmp_path)
    assert check_file(puzzle, path) == (True, "solved: LoRA forward")


LOOPED = """
import triton
import triton.language as tl
from lora_core.kernels.tile import round_to
WORDS, WARPS = 8192, 1
@triton.jit
def dequantize_kernel(words_ptr, absmax_ptr, levels_ptr, w_ptr, words, BLOCK_SIZE: tl.constexpr, WORDS: tl.constexpr):
    for first in range(0, WORDS, 64):
        word = tl.program_id(0) * WORDS + first + tl.arange(0, 64)
        packed = tl.load(words_ptr + word, mask=word < words, other=0)
        scale = tl.load(absmax_ptr + word * 8 // BLOCK_SIZE, mask=word < words, other=0.0)
        element = tl.arange(0, 8)
        level = tl.load(levels_ptr + ((packed[:, None] >> (element ^ 1)[None, :] * 4) & 15))
        place = word[:, None] * 8 + element[None, :]
        tl.store(w_ptr + place, round_to(level * scale[:, None], tl.bfloat16), mask=place < 8 * words)
"""


def test_puzzles_gate_counts_no_loop_once(tmp_path, capsys):
    """Instructions are counted as they stand in the code."""
    path = tmp_path / "mine.py"
    path.write_text(LOOPED)
    status, said = said_of(find_puzzle(13), path, capsys)
    assert status == WRONG and "there is a loop in the compiled code" in said, said


def test_puzzles_word_atomic_in_a_comment_is_no_atomic(tmp_path, capsys):
    puzzle = find_puzzle(9)
    path = edited(puzzle, "    acc = tl.zeros", "    # written, not added: no atomic_add\n    acc = tl.zeros", tmp_path)
    assert said_of(puzzle, path, capsys)[0] == SOLVED


def test_puzzles_gate_says_what_it_lacks_away_from_a_checkout(tmp_path):
    """A copy of the package without benchmarks beside it."""
    import shutil

    root = Path(__file__).resolve().parent.parent
    keep = shutil.ignore_patterns("__pycache__", "demo")
    shutil.copytree(root / "lora_core", tmp_path / "lora_core", ignore=keep)
    for folder in ("quant", "kernels"):
        shutil.copytree(root / folder, tmp_path / "lora_core" / folder, ignore=keep)
    command = [sys.executable, "-m", "lora_core.puzzles.run", "13", str(solution(find_puzzle(13)))]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 3 and "run it in a checkout" in done.stdout, done.stdout + done.stderr
