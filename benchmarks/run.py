"""Run benchmarks: `python -m benchmarks.run --op nf4_quantize --shape 4096x4096`.

Checks every provider, measures its peak memory and its time beside its rivals', appends a row each to
benchmarks/results/<op>.jsonl, and prints the rows as a table.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import machine, record, shapes
from benchmarks.case import Case, Check
from benchmarks.memory import peak_bytes
from benchmarks.table import claim_lines, table
from benchmarks.timing import AGAIN, interleave

CASES = Path(__file__).parent / "cases"
SAMPLES = 15
TABLE_COLUMNS = 120
FAILED = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks asked for; return 0, or 1 if this library failed a check or a claim."""
    options = _parser().parse_args(arguments)
    # the profiler that counts memory prints trace points otherwise; the hub is not asked for anything
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from rich.console import Console

    # a pipe or file has no width of its own; the table needs this much
    console = Console(width=None if sys.stdout.isatty() else TABLE_COLUMNS)
    wanted = options.op or case_names()
    sound = True
    for op in wanted:
        for case in cases_of(op, options.shape, options.device):
            if options.mode and case.mode != options.mode:
                continue
            sound &= _run(case, options, console)
    return 0 if sound else FAILED


def case_names() -> list[str]:
    """Return the names of the benchmarks there are."""
    return sorted(p.stem for p in CASES.glob("*.py") if p.stem != "__init__")


def cases_of(op: str, shape: dict[str, int] | None, device: str) -> Iterator[Case]:
    """Yield the comparisons of one benchmark, on the given shape or its own."""
    module = importlib.import_module(f"benchmarks.cases.{op}")
    for chosen in [shape] if shape else module.SHAPES:
        yield from module.cases(chosen, device)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--op", action="append", choices=case_names(), help="which benchmark; repeat for more; all by default"
    )
    parser.add_argument("--shape", type=shapes.parse, help="M=1024,N=512,K=512,R=16 or 4096x4096 (N x K)")
    parser.add_argument("--mode", choices=record.MODES, help="forward, backward or both; all by default")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="rounds of interleaved samples")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the samples")
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder the rows are appended in")
    return parser


def _run(case: Case, options: argparse.Namespace, console: Any) -> bool:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    checks: dict[str, Check] = {}
    peaks: dict[str, int] = {}
    with Progress(*columns, console=console, transient=True) as progress:
        steps = 2 * len(case.providers) + options.samples
        task = progress.add_task(f"{case.op} {case.mode}", total=steps)
        for provider in case.providers:
            checks[provider.name] = case.check(provider.name)
            progress.advance(task)
        sound = [p for p in case.providers if checks[p.name].passed]
        for provider in sound:
            peaks[provider.name] = peak_bytes(provider.measure_memory or provider.fresh(), options.device)
            progress.advance(task)
        ours = case.providers[0].name
        repeat = ours if checks[ours].passed else None
        timings: dict[str, Any] = {}
        for timings in interleave(sound, options.samples, options.device, options.seed, repeat=repeat):  # noqa: B007
            progress.advance(task)
    records = _records(case, options, timings, checks, peaks)
    path = options.results / f"{case.op}.jsonl"
    for row in records:
        record.append(path, row, checks[row.provider.removesuffix(AGAIN)])
    console.print(table(records, ours, case.note))
    for name, check in checks.items():
        if not check.passed:
            console.print(f"[red]{name} failed its check and was not timed:[/red] {check.reason}")
    lines, held = claim_lines(case.claims, records, ours)
    for line in lines:
        console.print(line)
    console.print(f"appended {len(records)} rows to {path}\n")
    return held and checks[ours].passed


def _records(
    case: Case,
    options: argparse.Namespace,
    timings: dict[str, Any],
    checks: dict[str, Check],
    peaks: dict[str, int],
) -> list[record.Record]:
    where = machine.describe(options.device)
    floor = machine.floor_ms(options.device, case.dtype, case.bytes_moved, case.flops)
    rows = []
    for name, timing in timings.items():
        check = checks[name.removesuffix(AGAIN)]
        # the second slot is for the time alone
        peak = None if name.endswith(AGAIN) else peaks[name] / 2**20
        rows.append(
            record.Record(
                schema=record.SCHEMA,
                timestamp_utc=datetime.now(UTC).isoformat(timespec="seconds"),
                op=case.op,
                provider=name,
                mode=case.mode,
                shape=case.shape,
                dtype=case.dtype,
                block_size=case.block_size,
                median_ms=timing.median_ms,
                p20_ms=timing.p20_ms,
                p80_ms=timing.p80_ms,
                samples=len(timing.samples_ms),
                warmup_ms=timing.warmup_ms,
                peak_mib=peak,
                bytes_moved=case.bytes_moved,
                flops=case.flops,
                floor_ms=floor,
                max_error=check.max_error,
                rms_error=check.rms_error,
                seed=options.seed,
                **where,
            )
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
