"""`lora-core doctor`: versions, devices, and every operation checked against its reference."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lora_core.doctor import Examination


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False) -> None:
    """Show what this installation runs, and check each operation; exit status 1 if one is wrong."""
    import dataclasses
    import json

    from lora_core.doctor import examine

    result = examine()
    if as_json:
        typer.echo(json.dumps({**dataclasses.asdict(result), "healthy": result.healthy}, indent=2))
    else:
        _show(result)
    if not result.healthy:
        raise typer.Exit(1)


def _show(result: "Examination") -> None:
    from rich.console import Console

    from lora_core.terminal import Column, print_table

    console = Console()
    for name, value in {**result.machine, **result.versions}.items():
        console.print(f"{name:14} {value}", highlight=False)
    heads = (Column("operation"), Column("device"), Column("runs", "name"), Column("check"), Column("detail", "prose"))
    rows = [
        (
            check.operation,
            check.device,
            check.implementation,
            "PASS" if check.passed else "FAIL",
            "; ".join((check.detail, *check.paths)),
        )
        for check in result.checks
    ]
    print_table(console, heads, rows)
