"""Checking one exercise, in a process of its own: `python -m lora_core.puzzles.run NUMBER FILE`.

The verdict is all that goes to standard output; what the learner's file prints goes to standard error.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from lora_core.errors import LoraCoreError
from lora_core.puzzles.catalogue import Puzzle, find_puzzle

# seconds after which a check is given up: the longest takes a few
LIMIT_S = 60
SOLVED, WRONG, UNUSABLE = 0, 1, 3


def check_file(puzzle: Puzzle, path: Path, limit_s: float = LIMIT_S) -> tuple[bool, str]:
    """Return whether a file solves an exercise, and what to say.

    Args:
        puzzle: the exercise.
        path: of the learner's file.
        limit_s: seconds after which it counts as an endless loop.
    Raises:
        LoraCoreError: if the exercise cannot be checked here, as 13 without a checkout.
    """
    environment = dict(os.environ)
    if puzzle.triton and not _has_gpu():
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "lora_core.puzzles.run", str(puzzle.number), str(path)]
    try:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, encoding="utf-8", timeout=limit_s)
    except subprocess.TimeoutExpired:
        return False, f"{path.name} was still running after {limit_s:g} s: is there a loop without an end?"
    said = done.stdout.strip()
    if done.returncode == UNUSABLE:
        raise LoraCoreError(said)
    if done.returncode not in (SOLVED, WRONG) or not said:
        said = f"the check of {path.name} broke off with exit status {done.returncode}"
        return False, said
    return done.returncode == SOLVED, said


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def main(arguments: list[str]) -> int:
    """Check a file here and now; print the verdict."""
    import warnings

    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(sys.stderr):
        status, said = verdict(find_puzzle(int(arguments[0])), Path(arguments[1]))
    # in whatever encoding this machine writes, the verdict is read in this one
    sys.stdout.buffer.write(f"{said}\n".encode(errors="backslashreplace"))
    return status


def alone(check: Callable[[Any], None]) -> Callable[[Any, ModuleType], None]:
    """Return a check of a function that looks at nothing else in its file."""
    return lambda function, module: check(function)


def verdict(puzzle: Puzzle, path: Path) -> tuple[int, str]:
    """Return SOLVED, WRONG or UNUSABLE, and what to say."""
    import torch

    from lora_core.puzzles import gate, tasks_torch, tasks_triton, walls
    from lora_core.puzzles.compare import WrongAnswer
    from lora_core.puzzles.load import describe, load

    checks: dict[int, Callable[[Any, ModuleType], None]] = {
        1: alone(tasks_torch.check_forward), 2: alone(tasks_torch.check_backward),
        3: alone(tasks_torch.check_unpack), 4: alone(tasks_torch.check_quantize),
        5: alone(tasks_torch.check_absmax), 6: alone(tasks_triton.check_scale),
        7: alone(tasks_triton.check_dequantize), 8: alone(tasks_triton.check_epilogue),
        9: tasks_triton.check_partial, 10: alone(tasks_triton.check_dropout),
        11: alone(tasks_torch.check_dora), 12: alone(tasks_torch.check_grouped), 13: gate.check_gate,
    }  # fmt: skip
    torch.manual_seed(puzzle.number)
    interpreted = puzzle.triton and os.environ.get("TRITON_INTERPRET") == "1"
    try:
        module = load(path)
        function = getattr(module, puzzle.function, None)
        if function is None:
            raise WrongAnswer(f"{path.name} has no {puzzle.function}: keep the name that the exercise gives")
        with walls.watched_loads() if interpreted else contextlib.nullcontext():
            checks[puzzle.number](function, module)
    except WrongAnswer as wrong:
        return WRONG, str(wrong)
    except LoraCoreError as error:
        return UNUSABLE, str(error)
    except SystemExit:
        return WRONG, f"{path.name} ends the program: take exit() out"
    except KeyboardInterrupt:
        return WRONG, f"the check of {path.name} was interrupted"
    except Exception as error:
        return WRONG, describe(error, path)
    return SOLVED, f"solved: {puzzle.title}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
