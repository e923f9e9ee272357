"""Write what was measured into docs/performance.md and README.md: `python -m benchmarks.results_table`.

The newest run of every comparison in benchmarks/results, in README.md of some operations on the machine measured last,
between two markers: our median (of a step of a model, with the tokens it takes a second), the best rival's, their ratio
with the spread inside which it says nothing, and the peak memory of both. What this library takes no part in is listed
for scale, and where it failed its check that is said. A device's rows stand together, as numbers of two machines are
not compared.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.markers import rewrite, row
from benchmarks.record import RESULTS, Record
from benchmarks.series import newest, of_suites, of_the_last_machine, ours_of, rivals_of, takes_part
from benchmarks.shapes import written
from benchmarks.table import compare, tokens_a_second
from benchmarks.timing import WIDEST_SPREAD

ROOT = Path(__file__).resolve().parent.parent
# which operations each file lists, on the machine measured last; None for all on all
FILES = {
    ROOT / "README.md": ("inject", "nf4_quantize", "nf4_dequantize", "training_step", "generation_step"),
    ROOT / "docs" / "performance.md": None,
}
COMMAND = "python -m benchmarks.results_table"
HEAD = ["what", "shape", "ours, ms", "best rival, ms", "speed", "peak memory, MiB"]
# of an operation that a device has more comparisons of than MOST, those of these sizes are listed
MOST, LISTED = 40, {"M": (1, 16, 4096), "R": (16,)}
GPU_PLACE = (
    f"On a GPU the suite is not measured yet: `python -m benchmarks.run --suite gpu`, then `{COMMAND}`, fills this in."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the tables."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.splitlines()[0])
    parser.parse_args(arguments)
    for path, ops in FILES.items():
        rewrite(path, COMMAND, table(ops=ops))
    return 0


def listed(folder: Path = RESULTS, ops: Sequence[str] | None = None) -> list[list[Record]]:
    """Return the newest run of every comparison; of some operations those of the machine that ran most of them last."""
    found = of_suites(newest(folder).values())
    return found if ops is None else of_the_last_machine(run for run in found if run[0].op in ops)


def table(folder: Path = RESULTS, ops: Sequence[str] | None = None) -> str:
    """Return what `listed` returns as Markdown: a table for each device."""
    found = listed(folder, ops)
    parts = []
    for device in sorted({run[0].device for run in found}):
        own = sorted((run for run in found if run[0].device == device), key=lambda run: _order(run[0]))
        versions = sorted({(run[0].torch, run[0].python) for run in own})
        said = ", ".join(f"PyTorch {torch} on Python {python}" for torch, python in versions)
        unsaved = sum(run[0].dirty for run in own)
        changed = f" {unsaved} of {len(own)} comparisons were measured with uncommitted changes." if unsaved else ""
        counts = Counter(run[0].op for run in own)
        shown = [run for run in own if counts[run[0].op] <= MOST or _is_listed(run[0].shape)]
        if len(shown) < len(own):
            changed += f" {len(shown)} of {len(own)} comparisons are listed, all lie in benchmarks/results."
        parts += [f"{device}; {said}.{changed}", "", row(HEAD), row(["---"] * len(HEAD)), *map(_line, shown), ""]
    if not any(run[0].cuda for run in found):
        parts.append(GPU_PLACE)
    return "\n".join(parts).rstrip()


def _is_listed(shape: dict[str, int]) -> bool:
    """Say whether a shape is among those listed of an operation with many comparisons."""
    return all(shape.get(name, among[0]) in among for name, among in LISTED.items())


def _order(first: Record) -> tuple[object, ...]:
    return first.op, first.block_size or 0, first.mode, tuple(first.shape.values())


def _line(run: list[Record]) -> str:
    first, mine = run[0], ours_of(run)
    what = f"{first.op}, {first.mode}, {first.dtype}" + (", NF4" if first.block_size else "")
    shape = written(first.shape)
    rivals = sorted(rivals_of(run), key=lambda r: r.median_ms)
    if mine is None:
        others = ", ".join(f"{_ms(r)} ({r.provider})" for r in rivals)
        said = "failed its check" if takes_part(first) else "not this library"
        return row([what, shape, "", others, said, ", ".join(map(_mib, rivals))])
    if not rivals:
        return row([what, shape, _own(mine), "", "", _mib(mine)])
    best = rivals[0]
    ratio, within, word = compare(run, mine.provider, best.provider)
    speed = f"{ratio:.2f}x, {word} (spread {within:.0%})"
    if within > WIDEST_SPREAD:
        speed = f"not measurable here (spread {within:.0%})"
    memory = f"{_mib(mine)} against {_mib(best)}"
    return row([what, shape, _own(mine), f"{_ms(best)} ({best.provider})", speed, memory])


def _own(r: Record) -> str:
    rate = tokens_a_second(r)
    return f"{_ms(r)} ({rate} tokens/s)" if rate else _ms(r)


def _ms(r: Record) -> str:
    return f"{r.median_ms:.3g}" if r.median_ms < 1000 else f"{r.median_ms:.0f}"


def _mib(r: Record) -> str:
    return "-" if r.peak_mib is None else f"{r.peak_mib:.1f}"


if __name__ == "__main__":
    sys.exit(main())
