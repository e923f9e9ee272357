"""Draw what is on record: `python -m benchmarks.plot` writes pictures beside the records, a set for each device.

bars      our speed relative to the best rival, comparison by comparison (benchmarks/bars.py); an operation with more of
          them than a picture holds has one of its own
roofline  operations a second over operations a byte, under the copy and matmul rates measured on that device
scaling   time over tokens, rank, adapters and model size, with the exponent of the upper half of the sizes
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import options
from benchmarks.bars import alone, bars
from benchmarks.case import YARDSTICKS
from benchmarks.colours import COLOURS, GREY, GRID, INK, MARKERS
from benchmarks.fit import exponent
from benchmarks.record import RESULTS, Record
from benchmarks.series import OURS, newest
from benchmarks.shapes import ordered
from benchmarks.timing import AGAIN

PICTURES = Path(__file__).parent / "pictures"
PIXELS_PER_INCH = 120
# what a sweep varies: the operation, the dimension, and how its axis is called
SWEEPS = (
    ("lora_linear", "M", "tokens M"),
    ("lora_linear", "R", "rank R"),
    ("grouped_lora", "G", "adapters in one batch"),
    ("training_step", "K", "hidden size of the model"),
)
# numbers of colours and markers; black for what stands beside for scale, of which no operation has two
LINES = {"lora_core": 0, "peft": 1, "compiled": 2, "torch": 3, "reference": 4, "torch masked": 5}
LINES |= dict.fromkeys(YARDSTICKS, len(COLOURS) - 1)
# sizes of a sweep, and of those that an exponent is fitted to
FEWEST_POINTS, FEWEST_FITTED = 4, 3

Run = list[Record]


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw every picture the records allow, and say where; return 1 where they allow none."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--pictures", type=options.folder, default=PICTURES, help="folder to draw into")
    given = parser.parse_args(arguments)
    found = list(newest(given.results).values())
    drawn = 0
    for device in sorted({run[0].device for run in found}):
        own = [run for run in found if run[0].device == device]
        name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        for kind, draw, shown in _kinds(own):
            figure = _figure()
            if draw(figure, shown):
                figure.suptitle(f"{device}, PyTorch {own[0][0].torch}", fontsize=9, x=0.01, ha="left")
                given.pictures.mkdir(parents=True, exist_ok=True)
                path = given.pictures / f"{kind}-{name}.png"
                # no date or version in the file: equal records give equal bytes
                figure.savefig(path, dpi=PIXELS_PER_INCH, metadata={"Software": None})
                print(path)
                drawn += 1
    if not drawn:
        sys.stderr.write(
            f"benchmarks.plot: nothing to draw in {given.results}, which holds {len(found)} comparisons: measure some "
            "by python -m benchmarks.run, or name the folder of its records by --results\n"
        )
    return 0 if drawn else 1


def _kinds(own: list[Run]) -> Iterator[tuple[str, Callable[[Any, list[Run]], bool], list[Run]]]:
    """Yield the pictures of a device: what each is called, what draws it, and the runs it shows."""
    large = alone(own)
    yield "bars", partial(bars, elsewhere=large), [run for run in own if run[0].op not in large]
    for op in large:
        yield f"bars-{op}", bars, [run for run in own if run[0].op == op]
    yield "roofline", roofline, own
    yield "scaling", scaling, own


def _figure() -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def roofline(figure: Any, found: list[Run]) -> bool:
    """Draw operations a second over operations a byte; return whether the device's rates are on record."""
    roofs = [min(run, key=lambda r: r.median_ms) for run in found if run[0].op == "roof"]
    copy = next((r.bytes_moved / r.median_ms / 1e6 for r in roofs if r.bytes_moved), None)
    peaks = {r.dtype: r.flops / r.median_ms / 1e6 for r in roofs if r.flops}
    # what a yardstick does is other work, whose operations and bytes are not these
    points = [
        r
        for run in found
        for r in run
        if r.flops and r.bytes_moved and r.op != "roof" and not (r.provider in YARDSTICKS or r.provider.endswith(AGAIN))
    ]
    dtypes = sorted({r.dtype for r in points} & set(peaks))
    if copy is None or not dtypes:
        return False
    axes = figure.add_subplot()
    intensities = [r.flops / r.bytes_moved for r in points if r.flops and r.bytes_moved]
    low, high = min(intensities) / 2, max(intensities) * 2
    for dtype in dtypes:
        edge = peaks[dtype] / copy
        axes.plot([low, edge, max(high, edge)], [low * copy, peaks[dtype], peaks[dtype]], color=INK, linewidth=1)
        axes.annotate(f"{dtype}: {peaks[dtype]:.3g} GFLOP/s", (max(high, edge), peaks[dtype]), ha="right", va="bottom")
    offset = {"xytext": (0, 10), "textcoords": "offset points"}
    axes.annotate(f"{copy:.3g} GB/s", (low, low * copy), va="bottom", rotation=30, **offset)
    ops = sorted({r.op for r in points})
    kinds = {"rivals": (COLOURS[1], 12), "lora_core": (COLOURS[0], 26)}
    for kind, (colour, size) in kinds.items():
        for op in ops:
            own = [r for r in points if r.op == op and _kind(r) == kind]
            axes.scatter(
                [r.flops / r.bytes_moved for r in own if r.flops and r.bytes_moved],
                [r.flops / r.median_ms / 1e6 for r in own if r.flops],
                color=colour,
                marker=MARKERS[ops.index(op) % len(MARKERS)],
                s=size,
                alpha=0.8,
                label=f"{op}: {kind}" if own else None,
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations for each byte that has to move")
    axes.set_ylabel("GFLOP/s")
    axes.grid(color=GRID, linewidth=0.6)
    axes.legend(fontsize=6, ncols=2)
    return True


def _kind(row: Record) -> str:
    return "lora_core" if row.provider.split(" ")[0] == OURS else "rivals"


def line_of(provider: str) -> dict[str, str]:
    """Return a provider's colour and marker, the same in every picture."""
    number = LINES.get(provider)
    return {"color": GREY, "marker": "x"} if number is None else {"color": COLOURS[number], "marker": MARKERS[number]}


def scaling(figure: Any, found: list[Run]) -> bool:
    """Draw time over each dimension that was swept; return whether one was."""
    panels = [(axis, chosen) for op, name, axis in SWEEPS if (chosen := _sweep(found, op, name))]
    if not panels:
        return False
    rows = -(-len(panels) // 2)
    figure.set_size_inches(9, 3.6 * rows)
    for place, (axis, chosen) in enumerate(panels):
        axes = figure.add_subplot(rows, min(len(panels), 2), place + 1)
        all_sizes = sorted({size for points in chosen.values() for size, _ in points})
        upper = all_sizes[len(all_sizes) // 2 :]
        title = None
        for provider, points in sorted(chosen.items()):
            points = sorted(points)
            fitted = [point for point in points if point[0] in upper]
            # of a curve that ends earlier it would be that of another range
            label = provider
            if len(fitted) == len(upper) >= FEWEST_FITTED:
                label = f"{provider}: ~ {exponent(*zip(*fitted, strict=True)):.2f}"
                title = f"exponent from {upper[0]:g} on"
            axes.plot(*zip(*points, strict=True), label=label, markersize=4, **line_of(provider))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(axis)
        axes.set_ylabel("ms")
        axes.grid(color=GRID, linewidth=0.6)
        axes.legend(fontsize=7, title=title, title_fontsize=7)
    return True


def _sweep(found: list[Run], op: str, name: str) -> dict[str, list[tuple[float, float]]]:
    """Return the largest set of runs of one commit that differ in one dimension alone: (size, median) by provider.

    Forward and backward together where both were measured, else the forward. What other sizes were measured at later
    is no part of a sweep.
    """
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in found:
        first = run[0]
        if first.op == op and name in first.shape:
            others = tuple((k, v) for k, v in ordered(first.shape).items() if k != name)
            groups.setdefault((others, first.dtype, first.block_size, first.commit), []).append(run)
    best = max(groups.values(), key=lambda runs: len({run[0].shape[name] for run in runs}), default=[])
    if len({run[0].shape[name] for run in best}) < FEWEST_POINTS:
        return {}
    mode = max(run[0].mode for run in best)  # "fwdbwd" comes last
    chosen: dict[str, list[tuple[float, float]]] = {}
    for row in (row for run in best for row in run if row.mode == mode and not row.provider.endswith(AGAIN)):
        chosen.setdefault(row.provider, []).append((float(row.shape[name]), row.median_ms))
    return {provider: points for provider, points in chosen.items() if len(points) >= FEWEST_FITTED}


if __name__ == "__main__":
    sys.exit(main())
