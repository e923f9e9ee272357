"""Solutions of the exercises, changed ones, and what the check says of a file."""

import re
from pathlib import Path

from lora_core.puzzles.run import main

SOLUTIONS = Path(__file__).resolve().parent / "solutions"


def solution(puzzle) -> Path:
    return SOLUTIONS / puzzle.file


def edited(puzzle, old, new, folder) -> Path:
    """Write the exercise's solution with one place changed; return the file."""
    text = solution(puzzle).read_text("utf-8")
    assert text.count(old) == 1, f"{puzzle.file} holds {old!r} {text.count(old)} times"
    path = folder / puzzle.file
    path.write_text(text.replace(old, new), "utf-8")
    return path


def rewritten(puzzle, changes, folder) -> Path:
    """Write the exercise's solution with all these changed at once, in the bodies of kernels; return the file."""
    parts = re.split(r"(def \w+\(.*?\):\n)", solution(puzzle).read_text("utf-8"), flags=re.DOTALL)
    assert all(any(old in body for body in parts[2::2]) for old in changes)
    either = re.compile("|".join(map(re.escape, changes)))
    bodies = [either.sub(lambda found: changes[found.group()], body) for body in parts[2::2]]
    path = folder / puzzle.file
    path.write_text(parts[0] + "".join(map("".join, zip(parts[1::2], bodies, strict=True))), "utf-8")
    return path


def said_of(puzzle, path, capsys) -> tuple[int, str]:
    status = main([str(puzzle.number), str(path)])
    return status, capsys.readouterr().out
