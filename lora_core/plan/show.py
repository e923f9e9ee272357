"""The calculators' results as tables for a terminal."""

from collections.abc import Sequence

from rich.console import Console

from lora_core.plan.catalogue import SHAPES
from lora_core.plan.compare import compare_methods
from lora_core.plan.figures import figures
from lora_core.plan.fit import SEARCH_END, Fit
from lora_core.plan.memory import MemoryPlan
from lora_core.plan.shape import ModelShape
from lora_core.terminal import Column, print_table, print_text

GIGA = 10**9


def show_plans(plans: Sequence[MemoryPlan]) -> None:
    """Print plans of one model side by side; a plan alone with how each row comes about."""
    console, shape, setup = Console(), plans[0].shape, plans[0].setup
    kept = "block inputs kept" if setup.checkpointing else "all activations kept"
    print_text(
        console,
        f"{shape.name}: {shape.parameters:,} parameters ({shape.source}); "
        f"{setup.batch} x {setup.sequence} tokens, {setup.dtype}, {setup.optimizer}, {kept}",
        styled=len(shape.name),
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
    columns = [Column("GB of 10^9 bytes"), *(Column(plan.setup.method, "number") for plan in plans)]
    print_table(console, columns + [Column("how it comes about", "prose")] * single, rows)


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
    numbers = ("fits", "largest rank", "largest batch", "longest sequence")
    print_table(console, [Column(f"on {gpu_gb:,.10g} GB"), *(Column(head, "number") for head in numbers)], rows)
    print_text(
        console,
        "Each largest size is found with all others as given. The CUDA context and the allocator's gaps are not "
        "counted; a card sold as 24 GB has 24 GiB, 25.8 GB, which leaves some room for them.",
    )


def _most(size: int) -> str:
    if size == 0:
        return "none fits"
    return f"{size:,}" if size < SEARCH_END else f"over {SEARCH_END:,}"


def show_figures(shape: ModelShape, rank: int) -> None:
    """Print the quoted figures, and the methods side by side on a model of this shape."""
    quoted, compared = figures(), compare_methods(shape, rank)
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
    columns = [
        Column("figure", "prose"),
        Column("said"),
        Column("by the formula", "prose"),
        Column("gives"),
        Column("right"),
        Column("why", "prose"),
    ]
    print_table(console, columns, rows)
    rows = [
        (c.method, f"{c.trainable:,}", f"{100 * c.share:.3f} %", c.overhead, c.stability, c.quality) for c in compared
    ]
    columns = [
        Column(shape.name, "prose"),
        Column("trained", "number"),
        Column("share", "number"),
        Column("left at inference", "prose"),
        Column("stability (judged)", "prose"),
        Column("quality (judged)", "prose"),
    ]
    print_table(console, columns, rows)


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
    numbers = ("parameters", "layers", "hidden", "inner", "vocabulary")
    columns = [Column("model"), *(Column(head, "number") for head in numbers), Column("source", "name")]
    print_table(Console(), columns, rows)


def _gb(size: int) -> str:
    return f"{size / GIGA:,.2f}"
