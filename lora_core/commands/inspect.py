"""`lora-core inspect`: what a checkpoint holds."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer

# rows shown of a long table
SHOWN_ROWS = 40


def inspect(
    path: Annotated[str, typer.Argument(help="An adapter's folder, a model's folder, or a .safetensors file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Show every row of long tables.")] = False,
) -> None:
    """Show the method, rank, scaling, targets, norms and bits per parameter of a checkpoint; nothing is unpickled.

    Exit status 1 if something is wrong with what it holds, 2 if it cannot be read.
    """
    import dataclasses
    import json

    from lora_core.inspect.path import inspect_path

    report = inspect_path(path)
    if as_json:
        typer.echo(json.dumps(finite(dataclasses.asdict(report)), indent=2))
    else:
        _show(report, None if every else SHOWN_ROWS)
    if report.problems:
        raise typer.Exit(1)


def finite(value: Any) -> Any:
    """Return value with NaN and infinity as null, which JSON has no words for."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def _show(report: Any, limit: int | None) -> None:
    from rich.console import Console

    from lora_core.terminal import Column, print_text

    console = Console()
    sizes = ", ".join(f"{name} {size / 2**20:.2f} MiB" for name, size in report.files.items())
    print_text(console, f"{report.path}: {report.kind}; {sizes}", styled=len(report.path))
    for name, value in report.settings.items():
        print_text(console, f"{name}: {value}", indent="  ")
    _table(
        console,
        "low-rank updates",
        [Column("module", "name"), *map(Column, ("rank", "scaling", "A", "B", "dtype")), Column("|sBA|", "prose")],
        [
            (
                p.module,
                str(p.rank),
                "?" if p.scaling is None else f"{p.scaling:g}",
                _sizes(p.shape_a),
                _sizes(p.shape_b),
                p.dtype,
                "0, never trained" if p.untrained else f"{p.update_norm:.4g}",
            )
            for p in report.pairs
        ],
        limit,
    )
    _table(
        console,
        "quantised weights",
        [
            Column("weight", "name"),
            *map(Column, ("type", "shape", "from", "block", "double")),
            Column("bits/parameter"),
        ],
        [
            (
                q.name,
                q.quant_type,
                _sizes(q.shape),
                q.dtype,
                str(q.block_size),
                "yes" if q.double_quant else "no",
                f"{q.bits_per_parameter:.5f}",
            )
            for q in report.quantised
        ],
        limit,
    )
    rows = [(t.name, _sizes(t.shape), t.dtype) for t in report.plain]
    _table(console, "other tensors", [Column("tensor", "name"), Column("shape"), Column("dtype")], rows, limit)
    for kind, colour, texts in (("problem:", "red", report.problems), ("note:", "yellow", report.notes)):
        for text in texts:
            print_text(console, f"{kind} {text}", style=colour, styled=len(kind))
    if not report.problems:
        console.print("no problems found")


def _table(console: Any, title: str, columns: list[Any], rows: Sequence[tuple[str, ...]], limit: int | None) -> None:
    from lora_core.terminal import print_table

    if not rows:
        return
    print_table(console, columns, rows[:limit], f"{title} ({len(rows)})")
    if limit is not None and len(rows) > limit:
        console.print(f"... and {len(rows) - limit} more; --all shows them")


def _sizes(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"
