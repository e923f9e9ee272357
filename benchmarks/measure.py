"""Measure one comparison: check, peak memory, time, and the rows and lines that come of it."""

import argparse
import time
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.markup import escape

from benchmarks import machine, record
from benchmarks.case import YARDSTICKS, Case, Check, Provider
from benchmarks.memory import peak_bytes, peak_bytes_of
from benchmarks.peers import told
from benchmarks.shapes import written
from benchmarks.table import claim_lines, table
from benchmarks.timing import AGAIN, ProviderError, interleave

# rounds at least, where all that are asked for would take longer than the seconds
LEAST_SAMPLES, CASE_SECONDS = 5, 3


def measure(case: Case, options: argparse.Namespace, progress: Any) -> bool:
    """Check, measure and record one comparison; return whether nothing raised and this library passed and kept it."""
    console = progress.console
    if not case.providers:
        console.print(f"{case.op} {written(case.shape)}")
        _print_missing(case, console)
        return True
    checks: dict[str, Check] = {}
    peaks: dict[str, int] = {}
    raised: dict[str, str] = {}
    ours = case.providers[0].name
    task = progress.add_task(
        f"{case.op} {case.mode} {written(case.shape)}", total=2 * len(case.providers) + options.samples
    )
    for provider in case.providers:
        try:
            checks[provider.name] = case.check(provider.name)
            if checks[provider.name].passed:
                build = provider.measure_memory
                peak = peak_bytes_of(build, options.device) if build else peak_bytes(provider.fresh(), options.device)
                peaks[provider.name] = peak
        except Exception as error:
            raised[provider.name] = told(error)
        progress.advance(task, 2)
        progress.refresh()
    sound = [p for p in case.providers if p.name in peaks]
    timings = _timings(sound, ours, options, progress, task, raised)
    progress.remove_task(task)
    records = _records(case, options, timings, checks, peaks)
    path = options.results / f"{case.op}.jsonl"
    for row in records:
        record.append(path, row, checks[row.provider.removesuffix(AGAIN)])
    console.print(table(records, ours, case.note))
    _print_missing(case, console)
    for name, reason in raised.items():
        console.print(f"[red]{name} raised and was not timed:[/red] {escape(reason)}")
    for name, check in checks.items():
        if not check.passed:
            console.print(f"[red]{name} failed its check and was not timed:[/red] {check.reason}")
    # what is not here claims nothing
    lines, held = claim_lines([c for c in case.claims if c.against not in case.missing], records, ours)
    for line in lines:
        console.print(line)
    console.print(f"appended {len(records)} rows to {path}\n")
    # what is claimed is claimed of the suite's shapes
    return (held or bool(options.shape)) and not raised and checks[ours].passed


def _print_missing(case: Case, console: Console) -> None:
    for name, reason in case.missing.items():
        console.print(f"not measured: {name}: {escape(reason)}")


def _timings(
    sound: list[Provider],
    ours: str,
    options: argparse.Namespace,
    progress: Any,
    task: Any,
    raised: dict[str, str],
) -> dict[str, Any]:
    """Time these providers; one that raises is put into `raised`, and the others begin anew without it."""
    before = next(t.completed for t in progress.tasks if t.id == task)
    while sound:
        timings: dict[str, Any] = {}
        began = time.monotonic()
        progress.update(task, completed=before)
        repeat = ours if ours in {p.name for p in sound} else None
        try:
            taken = interleave(sound, options.samples, options.device, options.seed, repeat=repeat)
            for rounds, so_far in enumerate(taken, 1):
                timings = so_far
                progress.advance(task)
                progress.refresh()
                if rounds >= LEAST_SAMPLES and time.monotonic() - began > CASE_SECONDS:
                    break
            return timings
        except ProviderError as error:
            raised[error.name] = told(error.__cause__ or error)
            sound = [p for p in sound if p.name != error.name]
    return {}


def _records(
    case: Case,
    options: argparse.Namespace,
    timings: dict[str, Any],
    checks: dict[str, Check],
    peaks: dict[str, int],
) -> list[record.Record]:
    floor = machine.floor_ms(options.device, case.dtype, case.bytes_moved, case.flops)
    rows = []
    for name, timing in timings.items():
        # a yardstick's work is not the case's
        same = name not in YARDSTICKS
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
                bytes_moved=case.bytes_moved if same else None,
                flops=case.flops if same else None,
                floor_ms=floor if same else None,
                max_error=check.max_error,
                rms_error=check.rms_error,
                seed=options.seed,
                **options.where,
            )
        )
    return rows
