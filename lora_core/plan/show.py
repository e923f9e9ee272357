"""The calculators' results as tables for a terminal."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lora_core.plan.catalogue import SHAPES, find_shape
from lora_core.plan.compare import compare_methods
from lora_core.plan.figures import figures
from lora_core.plan.fit import SEARCH_END, Fit
from lora_core.plan.memory import MemoryPlan

GIGA = 10**9


def show_plans(plans: Sequence[MemoryPlan]) -> None:
    """Print plans of one model side by side; a plan alone with how each row comes about."""
    console, shape, setup = Console(), plans[0].shape, plans[0].setup
    kept = "block inputs kept" if setup.checkpointing else "all activations kept"
    console.print(
        f"[bold]{escape(shape.name)}[/bold]: {shape.parameters:,} parameters ({escape(shape.source)}); "
        f"{setup.batch} x {setup.sequence} tokens, {setup.dtype}, {setup.optimizer}, {kept}",
        highlight=False,
    )
    single = len(plans) == 1
    rows = []
    for parts in zip(*(plan.rows for plan in plans), strict=True):
        reasons = [part.reason for part in parts] if single else []
        rows.append((parts[0].name, *(_gb(part.bytes) if part.bytes else "-" for part in parts), *reasons))
    end = [""] * single
    rows.append(("total", *(_gb(plan.total_bytes) for plan in plans), *end))
    rows.append(("trained parameters", *(f"{plan.trainable:,}" for plan in plans), *end))
    rows.append(("... of all", *(f"{100 * plan.trainable_share:.4f} %" for plan in plans), *end))
    heads = ["GB of 10^9 bytes", *(plan.setup.method for plan in plans), *(["how it comes about"] * single)]
    _table(console, heads, rows, numbers=len(plans))


def show_fits(plans: Sequence[MemoryPlan], fits: Sequence[Fit], gpu_gb: float) -> None:
    """Print what fits on a card, one row for each plan."""
    rows = [
        (
            plan.setup.method,
            "yes" if found.fits else "no",
            "-" if found.largest_rank is None else _most(found.largest_rank),
            _most(found.largest_batch),
            _most(found.largest_sequence),
        )
        for plan, found in zip(plans, fits, strict=True)
    ]
    console = Console()
    _table(console, [f"on {gpu_gb:g} GB", "fits", "largest rank", "largest batch", "longest sequence"], rows, numbers=4)
    console.print(
        "Each largest size is found with all others as given. The CUDA context and the allocator's gaps are not "
        "counted; a card sold as 24 GB has 24 GiB, 25.8 GB, which leaves some room for them.",
        highlight=False,
    )


def _most(size: int) -> str:
    if size == 0:
        return "none fits"
    return f"{size:,}" if size < SEARCH_END else f"over {SEARCH_END:,}"


def show_figures() -> None:
    """Print the quoted figures and the comparison of methods."""
    quoted, compared = figures(), compare_methods(find_shape("Llama-2-7B"))
    console = Console()
    rows = [
        (
            f.subject,
            _number(f.said, f.unit),
            f.formula,
            _number(f.from_formula, f.unit),
            _number(f.right, f.unit),
            f.why,
        )
        for f in quoted
    ]
    _table(console, ["figure", "said", "by the formula", "gives", "right", "why"], rows, numbers=0)
    rows = [
        (c.method, f"{c.trainable:,}", f"{100 * c.share:.3f} %", c.overhead, c.stability, c.quality) for c in compared
    ]
    heads = ["Llama-2-7B", "trained", "share", "left at inference", "stability (judged)", "quality (judged)"]
    _table(console, heads, rows, numbers=2)


def _number(value: float, unit: str) -> str:
    if float(value).is_integer():
        return f"{value:,.0f} {unit}".strip()
    return (f"{value:,.0f}" if value >= 10_000 else f"{value:,.4g}") + f" {unit}".rstrip()


def show_models() -> None:
    """Print the catalogue."""
    rows = [
        (
            s.name,
            f"{s.parameters:,}",
            str(s.layers),
            f"{s.hidden:,}",
            f"{s.intermediate:,}",
            f"{s.vocabulary:,}",
            s.source,
        )
        for s in SHAPES
    ]
    _table(Console(), ["model", "parameters", "layers", "hidden", "inner", "vocabulary", "source"], rows, numbers=5)


def _table(console: Console, heads: list[str], rows: Iterable[tuple[str, ...]], numbers: int) -> None:
    table = Table()
    for index, head in enumerate(heads):
        number = 0 < index <= numbers
        # a number stays whole however narrow the terminal; texts around it give way
        table.add_column(head, justify="right" if number else "left", overflow="fold", no_wrap=number)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)


def _gb(size: int) -> str:
    return f"{size / GIGA:,.2f}"
