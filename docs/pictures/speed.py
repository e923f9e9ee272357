"""The speeds that README.md lists, as bars: the newest records of one machine, drawn by benchmarks.plot."""

from dataclasses import asdict
from typing import Any

from benchmarks.plot import bars
from benchmarks.record import Record
from benchmarks.results_table import FILES, ROOT, listed
from lora_core.demo.charts import Theme

# benchmarks.plot sets the size by the number of bars
SIZE = (8.0, 3.0)


def numbers() -> dict[str, Any]:
    """Return the runs that README.md lists."""
    runs = listed(ops=FILES[ROOT / "README.md"])
    return {
        "title": f"Speed relative to the best rival: {runs[0][0].device}",
        "runs": [[asdict(row) for row in run] for run in runs],
    }


def draw(figure: Any, found: dict[str, Any], theme: Theme) -> None:
    """Draw a bar a comparison."""
    bars(figure, [[Record(**row) for row in run] for run in found["runs"]], ink=theme.ink, grid=theme.faint)
