"""The speeds that README.md lists, as bars: the newest records of one machine, drawn by benchmarks.plot."""

from collections import Counter
from dataclasses import asdict
from typing import Any

from benchmarks.plot import bars
from benchmarks.record import Record
from benchmarks.results_table import FILES, ROOT
from benchmarks.series import newest, of_suites
from lora_core.demo.charts import Theme

# benchmarks.plot sets the size by the number of bars
SIZE = (8.0, 3.0)


def numbers() -> dict[str, Any]:
    """Return the newest runs of the operations that README.md lists, of the machine that ran most of them last."""
    listed = FILES[ROOT / "README.md"] or ()
    runs = [run for run in of_suites(newest().values()) if run[0].op in listed]
    counts = Counter(run[0].device for run in runs)
    # not of one that ran a few of them
    suites = [run for run in runs if 2 * counts[run[0].device] >= max(counts.values())]
    device = max(suites, key=lambda run: run[0].timestamp_utc)[0].device
    own = [[asdict(row) for row in run] for run in runs if run[0].device == device]
    return {"title": f"Speed over the best rival's: {device}", "runs": own}


def draw(figure: Any, found: dict[str, Any], theme: Theme) -> None:
    """Draw a bar a comparison."""
    bars(figure, [[Record(**row) for row in run] for run in found["runs"]], ink=theme.ink, grid=theme.faint)
