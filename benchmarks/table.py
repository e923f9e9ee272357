"""Rows as a table, and whether they bear out what a case claims."""

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.case import YARDSTICKS, Claim, is_rival
from benchmarks.record import Record
from benchmarks.shapes import written
from benchmarks.timing import AGAIN, WIDEST_SPREAD, spread, verdict

# operations that are a step of a model, on M tokens
STEPS = ("training_step", "generation_step")


def table(records: Sequence[Record], ours: str, note: str = "") -> Any:
    """Return a rich table: provider, median, ratio to the best rival, memory, share of the floor, error.

    Of a model's step, how many tokens it takes a second as well.

    Args:
        records: the rows of one comparison.
        ours: the provider the others are rivals of.
        note: what the rows' fields leave open.
    """
    from rich.table import Table

    first = records[0] if records else None
    title = "nothing passed its check"
    if first is not None:
        title = " ".join(t for t in (first.op, first.mode, written(first.shape), first.dtype, note) if t)
    view = Table(title=title, title_justify="left")
    view.add_column("provider")
    columns = ["median ms", "p20-p80 ms", "best rival / this", "peak MiB", "floor / this", "max error"]
    steps = first is not None and first.op in STEPS
    for name in [*columns, "tokens/s"] if steps else columns:
        view.add_column(name, justify="right")
    for row in records:
        if row.provider.endswith(AGAIN):
            continue
        view.add_row(
            f"{row.provider} (for scale)" if row.provider in YARDSTICKS else row.provider,
            f"{row.median_ms:.3g}" if row.median_ms < 100 else f"{row.median_ms:.0f}",
            f"{row.p20_ms:.3g}-{row.p80_ms:.3g}",
            _against_best(row, records, ours),
            "-" if row.peak_mib is None else f"{row.peak_mib:.1f}",
            "-" if row.floor_ms is None else f"{row.floor_ms / row.median_ms:.0%}",
            f"{row.max_error:.2g}",
            *([tokens_a_second(row)] if steps else []),
        )
    return view


def tokens_a_second(row: Record) -> str:
    """Return how many tokens a second a step takes, or ""."""
    return f"{1e3 * row.shape['M'] / row.median_ms:,.0f}" if row.op in STEPS and row.median_ms else ""


def best_rival(records: Iterable[Record], ours: str) -> Record | None:
    """Return the fastest row that does the same work and is not ours, by whatever path."""
    rivals = [r for r in records if is_rival(r.op, r.mode, r.provider, ours)]
    return min(rivals, key=lambda r: r.median_ms, default=None)


def compare(records: Sequence[Record], ours: str, rival: str) -> tuple[float, float, str]:
    """Return the rival's median over ours, the spread, and "faster", "slower" or "tie".

    Args:
        records: the rows of one comparison.
        ours: a provider.
        rival: another.
    """
    rows = {r.provider: r for r in records}
    mine, theirs, again = rows[ours], rows[rival], rows.get(ours + AGAIN)
    within = spread(mine, theirs, again)
    return theirs.median_ms / mine.median_ms, within, verdict(mine.median_ms, theirs.median_ms, within)


def claim_lines(claims: Iterable[Claim], records: Sequence[Record], ours: str) -> tuple[list[str], bool]:
    """Return a line for every claim, and whether all of them hold.

    A claim about a provider that was not measured does not hold.
    """
    outcomes = [o for claim in claims for o in _outcomes(claim, records, ours)]
    return [f"{'holds' if held else 'DOES NOT HOLD'}: {text}" for text, held in outcomes], all(h for _, h in outcomes)


def _against_best(row: Record, records: Sequence[Record], ours: str) -> str:
    best = best_rival(records, ours)
    if best is None:
        return "-"
    if row is best:
        return "1.00"
    return said(*compare(records, row.provider, best.provider))


def said(ratio: float, within: float, word: str) -> str:
    """Return in words what compare returns: no ratio where the spread says that it could be any."""
    return f"not measurable (spread {within:.0%})" if within > WIDEST_SPREAD else f"{ratio:.2f} ({word}, {within:.1%})"


def _outcomes(claim: Claim, records: Sequence[Record], ours: str) -> Iterable[tuple[str, bool]]:
    rows = {r.provider: r for r in records}
    missing = [name for name in (ours, claim.against) if name and name not in rows]
    if missing:
        yield f"{missing[0]} was not measured", False
        return
    mine = rows[ours]
    if claim.limit_ms is not None:
        yield f"under {claim.limit_ms:g} ms: {mine.median_ms:.0f} ms", mine.median_ms < claim.limit_ms
    if not claim.against:
        return
    theirs = rows[claim.against]
    ratio, within, word = compare(records, ours, claim.against)
    measurable = within <= WIDEST_SPREAD
    measured = f"{ratio:.2f} times its speed, {word} within {within:.1%}"
    if not measurable:
        measured = f"not measurable here, spread {within:.0%}"
    if claim.no_slower:
        yield f"no slower than {claim.against}: {measured}", measurable and word != "slower"
    if claim.speed is not None:
        reaches = ", which reaches below" if measurable and ratio >= claim.speed > ratio / (1 + within) else ""
        aim = f"at least {claim.speed:g} times as fast as {claim.against}"
        yield f"{aim}: {measured}{reaches}", measurable and ratio >= claim.speed
    if claim.no_larger and mine.peak_mib is not None and theirs.peak_mib is not None:
        sizes = f"{mine.peak_mib:.1f} MiB against {theirs.peak_mib:.1f} MiB"
        yield f"no larger in peak memory than {claim.against}: {sizes}", mine.peak_mib <= theirs.peak_mib
