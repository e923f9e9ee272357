"""`lora-core puzzles`: exercises that check themselves."""

import reprlib
from pathlib import Path
from typing import Annotated

import typer

ACTIONS = ("list", "start", "hint", "check")
FOLDER = "lora-core-puzzles"


def puzzles(
    action: Annotated[str, typer.Argument(help="list, start, hint or check.")] = "list",
    what: Annotated[str, typer.Argument(help="Number of the exercise, `all`, or a folder to start in.")] = "",
    file: Annotated[Path | None, typer.Option(help="Check this file instead.")] = None,
    level: Annotated[int, typer.Option(help="How much a hint gives away, from 1.")] = 1,
) -> None:
    """Exercises from the LoRA forward to a kernel with a budget: list, start [FOLDER], hint N, check N."""
    from lora_core.errors import ConfigError
    from lora_core.puzzles.catalogue import PUZZLES, find_puzzle

    if action not in ACTIONS:
        raise ConfigError(f"puzzles {action!r}: want one of {', '.join(ACTIONS)}")
    if action == "list":
        for puzzle in PUZZLES:
            typer.echo(f"{puzzle.number:2}  {puzzle.title:<50} {puzzle.file}{'   (Triton)' * puzzle.triton}")
        return
    if action == "start":
        _start(Path(what or FOLDER))
        return
    if what == "all" and action == "check" and file is None:
        chosen = list(PUZZLES)
    # longer than any number of an exercise, a row of digits may be more than int() takes
    elif what.isdecimal() and len(what) < 10:
        chosen = [find_puzzle(int(what))]
    else:
        shown = reprlib.repr(what)
        every = ", or all" if action == "check" and file is None else ""
        raise ConfigError(f"puzzles {action} {shown}: want the number of an exercise, 1 to {len(PUZZLES)}{every}")
    if action == "hint":
        hints = chosen[0].hints
        if not 1 <= level <= len(hints):
            raise ConfigError(f"--level is {level}; exercise {what} has hints of level 1 to {len(hints)}")
        typer.echo(hints[level - 1])
        return
    solved = [_check(puzzle.number, file) for puzzle in chosen]
    if not all(solved):
        raise typer.Exit(1)


def _start(folder: Path) -> None:
    """Copy the exercises into a folder; what is there already stays."""
    from lora_core.errors import ConfigError
    from lora_core.puzzles.catalogue import PUZZLES, stub

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        why = (getattr(error, "strerror", None) or str(error)).lower()
        raise ConfigError(f"puzzles start {folder}: {why}; want a folder, new or not, that can be written") from None
    for puzzle in PUZZLES:
        path = folder / puzzle.file
        if path.exists():
            typer.echo(f"{path} is there already and stays as it is")
        else:
            path.write_text(stub(puzzle).read_text("utf-8"), encoding="utf-8")
            typer.echo(path)


def _check(number: int, file: Path | None) -> bool:
    from lora_core.errors import ConfigError
    from lora_core.puzzles.catalogue import find_puzzle
    from lora_core.puzzles.run import check_file

    puzzle = find_puzzle(number)
    folders = (Path(), Path(FOLDER), Path("docs/puzzles"))
    places = [file] if file else [folder / puzzle.file for folder in folders]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        where = "" if file else ", in the folder that lora-core puzzles start has made or by --file"
        raise ConfigError(f"{places[0]} is no file here: want the one with your solution{where}")
    solved, said = check_file(puzzle, path)
    typer.echo(f"{'ok  ' if solved else 'no  '}{puzzle.number:2}  {said}")
    return solved
