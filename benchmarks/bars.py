"""Our speed relative to the best rival, comparison by comparison, with the spread inside which it says nothing.

What has a spread above 100% is left out. A picture holds so many bars at most; which it leaves out it says.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.colours import COLOURS, GREY, GRID, INK
from benchmarks.record import Record
from benchmarks.series import of_suites, ours_of, rivals_of
from benchmarks.shapes import written
from benchmarks.table import compare
from benchmarks.timing import WIDEST_SPREAD

# bars of one picture: 2,400 pixels of height at 120 an inch
MOST = 80
# what most shapes of the suites have: drawn before other ranks
RANK = 16

Run = list[Record]


@dataclass(frozen=True)
class Bar:
    """A comparison.

    Args:
        op: the operation.
        label: what was compared.
        rank: of the adapter, or None.
        ratio: our speed over the rival's.
        within: the spread.
        word: "faster", "slower" or "tie".
    """

    op: str
    label: str
    rank: int | None
    ratio: float
    within: float
    word: str


def bars(figure: Any, found: list[Run], ink: str = INK, grid: str = GRID, elsewhere: Sequence[str] = ()) -> bool:
    """Draw our speed relative to the best rival, lines in these colours; return whether there was anything to draw.

    Args:
        figure: to draw into.
        found: runs of one device.
        ink: colour of the lines.
        grid: colour of the grid.
        elsewhere: operations that have a picture of their own, for the text.
    """
    lines = _lines(found)
    if not lines:
        return False
    shown = _at_most(lines, MOST)
    figure.set_size_inches(10, 1.2 + 0.24 * len(shown))
    axes = figure.add_subplot()
    colours = {"faster": COLOURS[0], "slower": COLOURS[1], "tie": GREY}
    places = range(len(shown))[::-1]
    for place, bar in zip(places, shown, strict=True):
        axes.barh(place, bar.ratio - 1, left=1, color=colours[bar.word], height=0.7)
        ends = [bar.ratio / (1 + bar.within), bar.ratio * (1 + bar.within)]
        axes.plot(ends, [place, place], color=ink, linewidth=1)
    axes.axvline(1, color=ink, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_yticks(places, [bar.label for bar in shown], fontsize=7)
    axes.set_ylim(-0.7, len(shown) - 0.3)
    notes = ["speed relative to the best rival; the line is the spread, grey a tie"]
    if len(shown) < len(lines):
        notes.append(f"{len(shown)} of {len(lines)} comparisons: R={RANK} first, evenly spread where too many")
    if elsewhere:
        notes.append(f"in pictures of their own: {', '.join(elsewhere)}")
    axes.set_xlabel("\n".join(notes))
    axes.grid(axis="x", color=grid, linewidth=0.6)
    axes.set_axisbelow(True)
    return True


def alone(found: list[Run]) -> list[str]:
    """Return the operations that fill a picture of their own, where all do not fit into one."""
    counts = Counter(bar.op for bar in _lines(found))
    return sorted(op for op, count in counts.items() if count > MOST)


def _lines(found: Iterable[Run]) -> list[Bar]:
    lines = []
    for run in sorted(of_suites(found), key=lambda run: (*_kind_of_work(run[0]), *run[0].shape.values())):
        mine, rivals = ours_of(run), rivals_of(run)
        if mine is not None and rivals:
            best = min(rivals, key=lambda r: r.median_ms)
            ratio, within, word = compare(run, mine.provider, best.provider)
            if within > WIDEST_SPREAD:
                continue
            shape = written(mine.shape)
            four_bit = " NF4" if mine.block_size and not mine.op.startswith("nf4") else ""
            label = f"{mine.op}{four_bit} {mine.mode} {shape}, against {best.provider}"
            lines.append(Bar(mine.op, label, mine.shape.get("R"), ratio, within, word))
    return lines


def _kind_of_work(row: Record) -> tuple[str, str, int]:
    return row.op, row.mode, row.block_size or 0


def _at_most(lines: list[Bar], most: int) -> list[Bar]:
    """Return so many of the lines in their order: those of RANK or no rank first, every nth of what is too many."""
    first = [place for place, bar in enumerate(lines) if bar.rank in (RANK, None)]
    others = [place for place, bar in enumerate(lines) if bar.rank not in (RANK, None)]
    kept = _spread(first, most)
    return [lines[place] for place in sorted(itertools.chain(kept, _spread(others, most - len(kept))))]


def _spread(places: list[int], most: int) -> list[int]:
    if len(places) <= most:
        return places
    return [places[number * len(places) // most] for number in range(most)]
