"""`lora-core inspect`: what a checkpoint holds."""

from typing import Annotated, Any

import typer

# rows shown of a long table
SHOWN_ROWS = 40


def inspect(
    path: Annotated[str, typer.Argument(help="An adapter's folder, a model's folder, or a .safetensors file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Show every row of long tables.")] = False,
) -> None:
    """Show the method, rank, scaling, targets, norms and bits per parameter of a checkpoint; nothing is unpickled."""
    import dataclasses
    import json

    from lora_core.inspect.path import inspect_path

    report = inspect_path(path)
    if as_json:
        typer.echo(json.dumps(finite(dataclasses.asdict(report)), indent=2))
        return
    _show(report, None if every else SHOWN_ROWS)


def finite(value: Any) -> Any:
    """Return value with NaN and infinity as null, which JSON has no words for."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def _show(report: Any, limit: int | None) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    sizes = ", ".join(f"{name} {size / 2**20:.2f} MiB" for name, size in report.files.items())
    console.print(f"[bold]{escape(report.path)}[/bold]: {report.kind}; {escape(sizes)}", highlight=False)
    for name, value in report.settings.items():
        console.print(f"  {name}: {escape(str(value))}", highlight=False)
    _table(
        console,
        "low-rank updates",
        ("module", "rank", "scaling", "A", "B", "dtype", "|s B A|"),
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
        ("weight", "type", "shape", "from", "block", "double", "bits/parameter"),
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
    _table(console, "other tensors", ("tensor", "shape", "dtype"), rows, limit)
    for text in report.problems:
        console.print(f"[red]problem:[/red] {escape(text)}", highlight=False)
    for text in report.notes:
        console.print(f"[yellow]note:[/yellow] {escape(text)}", highlight=False)
    if not report.problems:
        console.print("no problems found")


def _table(console: Any, title: str, heads: tuple[str, ...], rows: list[Any], limit: int | None) -> None:
    from rich.markup import escape
    from rich.table import Table

    if not rows:
        return
    table = Table(title=f"{title} ({len(rows)})", title_justify="left")
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows[:limit]:
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)
    if limit is not None and len(rows) > limit:
        console.print(f"... and {len(rows) - limit} more; --all shows them")


def _sizes(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"
