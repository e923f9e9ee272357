"""One measurement, and the only way to write it: append-only JSON lines, never without a passing check.

Rows are not changed. Those that turn out to have measured something else than they say are taken out, by a commit that
names them and the reason.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.case import Check, CheckError

SCHEMA = 1
MODES = ("fwd", "bwd", "fwdbwd")
DIMENSIONS = ("M", "N", "K", "R", "G")

RESULTS = Path(__file__).parent / "results"

# what may be null: it was not measured, or does not apply
OPTIONAL = {"block_size", "peak_mib", "bytes_moved", "flops", "floor_ms", "driver", "cuda", "triton"}
TEXT = {
    "timestamp_utc",
    "commit",
    "op",
    "provider",
    "mode",
    "dtype",
    "device",
    "driver",
    "cuda",
    "torch",
    "triton",
    "python",
}
WHOLE = {"schema", "block_size", "samples", "bytes_moved", "flops", "seed"}


class RecordError(ValueError):
    """A row does not follow the schema."""


@dataclass(frozen=True)
class Record:
    """One provider's measurement of one operation in one mode on one shape.

    Args:
        schema: version of this list of fields.
        timestamp_utc: ISO 8601, when the measurement ended.
        commit: hash of the checked-out commit.
        dirty: whether tracked files differed from it at the start of the run, but for what benchmarks write.
        op: the operation's name.
        provider: who did the work; " (again)" marks the same code in a second slot of the same run.
        mode: "fwd", "bwd" or "fwdbwd".
        shape: M tokens, N out, K in, R rank, G adapters of one batch; those that apply.
        dtype: of the inputs.
        block_size: elements sharing a scale.
        median_ms: median time of a sample.
        p20_ms: 20th percentile.
        p80_ms: 80th percentile.
        samples: how many were taken.
        warmup_ms: time spent on running before the first sample.
        peak_mib: most memory held above the start, in 2^20 bytes.
        bytes_moved: least bytes to be read and written.
        flops: floating-point operations needed.
        floor_ms: the larger of bytes over measured copy rate and flops over measured matmul rate of the device.
        max_error: largest absolute error against the truth.
        rms_error: root mean square error.
        device: processor or GPU.
        driver: GPU driver.
        cuda: CUDA version.
        torch: PyTorch version, with the number of threads on CPU in `device`.
        triton: Triton version.
        python: Python version.
        seed: of the random inputs and of the order of the samples.
    """

    schema: int
    timestamp_utc: str
    commit: str
    dirty: bool
    op: str
    provider: str
    mode: str
    shape: dict[str, int]
    dtype: str
    block_size: int | None
    median_ms: float
    p20_ms: float
    p80_ms: float
    samples: int
    warmup_ms: float
    peak_mib: float | None
    bytes_moved: int | None
    flops: int | None
    floor_ms: float | None
    max_error: float
    rms_error: float
    device: str
    driver: str | None
    cuda: str | None
    torch: str
    triton: str | None
    python: str
    seed: int

    def __post_init__(self) -> None:
        validate(asdict(self))


NAMES = tuple(f.name for f in fields(Record))


def validate(row: dict[str, Any]) -> None:
    """Raise RecordError unless row has exactly the schema's fields, each of its type and in its range."""
    missing, unknown = sorted(set(NAMES) - set(row)), sorted(set(row) - set(NAMES))
    if missing or unknown:
        raise RecordError(f"row has missing fields {missing} and unknown fields {unknown}; want exactly {NAMES}")
    if row["schema"] != SCHEMA:
        raise RecordError(f"schema is {row['schema']!r}, this code reads and writes {SCHEMA}")
    for name, value in row.items():
        _validate_field(name, value)
    if row["mode"] not in MODES:
        raise RecordError(f"mode is {row['mode']!r}, want one of {MODES}")
    if not row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]:
        raise RecordError(f"want p20 <= median <= p80, got {row['p20_ms']}, {row['median_ms']}, {row['p80_ms']} ms")
    if row["samples"] < 1:
        raise RecordError(f"samples is {row['samples']}, want at least 1")


def _validate_field(name: str, value: Any) -> None:
    if value is None and name in OPTIONAL:
        return
    if name == "shape":
        bad = not isinstance(value, dict) or not set(value) <= set(DIMENSIONS)
        if bad or not all(type(v) is int and v >= 0 for v in value.values()):
            raise RecordError(f"shape is {value!r}, want whole numbers under {DIMENSIONS}")
    elif name == "dirty":
        if type(value) is not bool:
            raise RecordError(f"dirty is {value!r}, want true or false")
    elif name in TEXT:
        if not isinstance(value, str) or not value:
            raise RecordError(f"{name} is {value!r}, want a text")
    elif name in WHOLE:
        if type(value) is not int or value < 0:
            raise RecordError(f"{name} is {value!r}, want a whole number of at least 0")
    elif type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise RecordError(f"{name} is {value!r}, want a finite number of at least 0")


def append(path: Path, record: Record, check: Check | None) -> None:
    """Add one row to a results file; nothing in it is ever changed.

    Raises:
        CheckError: unless check passed and is the one the record's errors come from.
    """
    if check is None or not check.passed:
        why = "was never checked" if check is None else f"failed its check: {check.reason}"
        raise CheckError(f"{record.op} by {record.provider} {why}; its time is not recorded")
    if (check.max_error, check.rms_error) != (record.max_error, record.rms_error):
        raise CheckError(f"{record.op} by {record.provider}: the record's errors are not those of its check")
    path.parent.mkdir(parents=True, exist_ok=True)
    # one write of one line: runs that append at the same time do not tear each other's rows
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(record), allow_nan=False) + "\n")


def read(path: Path) -> Iterator[Record]:
    """Yield the rows of a results file.

    Raises:
        RecordError: for a row of another schema, naming its line.
    """
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            validate(row)
        except (json.JSONDecodeError, RecordError) as error:
            raise RecordError(f"{path}, line {number}: {error}") from error
        yield Record(**row)
