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
    from rich.table import Table

    console = Console()
    for name, value in {**result.machine, **result.versions}.items():
        console.print(f"{name:14} {value}", highlight=False)
    table = Table()
    for head in ("operation", "device", "runs", "check", "detail"):
        table.add_column(head, overflow="fold")
    for check in result.checks:
        verdict = "[green]PASS[/green]" if check.passed else "[red]FAIL[/red]"
        table.add_row(
            check.operation, check.device, check.implementation, verdict, "; ".join((check.detail, *check.paths))
        )
    console.print(table)
