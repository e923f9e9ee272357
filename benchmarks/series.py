"""Recorded rows, put back together: the rows of one run of one comparison, and the newest run of each."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from benchmarks.case import is_rival
from benchmarks.record import RESULTS, Record, read
from benchmarks.shapes import ordered, swept_only, written
from benchmarks.timing import AGAIN

OURS = "lora_core"
# what measures the machine, not this library
MACHINE = ("roof",)

Key = tuple[str, str, str, str, int | None, str]


def key_of(row: Record) -> Key:
    """Return what makes two rows comparable: device, operation, mode, dtype, block size, shape."""
    return row.device, row.op, row.mode, row.dtype, row.block_size, written(ordered(row.shape))


def runs(rows: Iterable[Record]) -> list[list[Record]]:
    """Return the rows of each run of one comparison together, in the order in which they were appended."""
    found: list[list[Record]] = []
    for row in rows:
        last = found[-1] if found else []
        same = bool(last) and key_of(last[0]) == key_of(row) and row.provider not in {r.provider for r in last}
        if same:
            last.append(row)
        else:
            found.append([row])
    return found


def newest(folder: Path = RESULTS) -> dict[Key, list[Record]]:
    """Return the newest run of every comparison on record."""
    found: dict[Key, list[Record]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for run in runs(read(path)):
            found[key_of(run[0])] = run
    return found


def of_suites(found: Iterable[list[Record]]) -> list[list[Record]]:
    """Return the runs that belong to a suite: no figures of the machine, no points of a sweep."""
    return [run for run in found if run[0].op not in MACHINE and not swept_only(run[0].op, run[0].shape)]


def of_the_last_machine(found: Iterable[list[Record]]) -> list[list[Record]]:
    """Return the runs of the machine that ran most of them last; not of one that ran a few of them."""
    found = list(found)
    counts = Counter(run[0].device for run in found)
    suites = [run for run in found if 2 * counts[run[0].device] >= max(counts.values())]
    device = max((run[0] for run in suites), key=lambda row: row.timestamp_utc).device if suites else ""
    return [run for run in found if run[0].device == device]


def ours_of(run: list[Record]) -> Record | None:
    """Return this library's row; None where it takes no part, or did not pass its check."""
    return next((row for row in run if row.provider == OURS), None)


def rivals_of(run: list[Record]) -> list[Record]:
    """Return the rows of other providers that do the same work; this library's by a path of its choice are none."""
    return [r for r in run if is_rival(r.op, r.mode, r.provider, OURS) and not r.provider.endswith(AGAIN)]


def takes_part(row: Record) -> bool:
    """Say whether this library does the work a row is about: full fine-tuning, a step without a rank, is PyTorch's."""
    return row.op != "training_step" or "R" in row.shape
