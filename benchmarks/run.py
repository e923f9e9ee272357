"""Run benchmarks: `python -m benchmarks.run`, or `--op nf4_quantize --shape 4096x4096` for a part.

Checks every provider, measures its peak memory and its time beside its rivals', appends a row each to
benchmarks/results/<op>.jsonl, and prints the rows as a table. A provider that cannot run here is listed with the
reason; one that raises, or a comparison that does, is listed and the rest goes on. The suite is what this machine can
do: "gpu" where there is one, else "cpu"; "static" needs neither and predicts from the compiled kernels
(benchmarks/static.py).
"""

import argparse
import contextlib
import gc
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import asked, heap, machine, options, record, shapes
from benchmarks.case import Case, Check
from benchmarks.measure import measure
from benchmarks.peers import told, why_none

CASES = Path(__file__).parent / "cases"
# rounds of a comparison, at most
SAMPLES = 15
TABLE_COLUMNS = 120
FAILED = 1
SUITES = ("cpu", "gpu", "static")
# a benchmark and a shape of it
Job = tuple[str, dict[str, int]]
COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    TaskProgressColumn(),
    TextColumn("elapsed"),
    TimeElapsedColumn(),
    TextColumn("left"),
    TimeRemainingColumn(),
)


def main(arguments: Sequence[str] | None = None, program: str = "python -m benchmarks.run") -> int:
    """Run the benchmarks asked for; return 0, or 1 if this library failed a check or a claim, or anything raised.

    Args:
        arguments: of the command line; by default those of the process.
        program: what the messages call it.
    """
    parser = _parser(program)
    given = parser.parse_args(arguments)
    # the profiler that counts memory prints trace points otherwise; the hub is not asked for anything
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    suite = given.suite or ("gpu" if _has_gpu() else "cpu")
    try:
        if suite == "static":
            from benchmarks import static

            return static.main(asked.of_static(given, parser, case_names()), program)
        if suite == "gpu" and not _has_gpu():
            sys.stderr.write(f"{program}: the gpu suite needs a CUDA device; none is here. --suite cpu runs without\n")
            return FAILED
        if suite == "cpu":
            heap.keep_freed_memory()
            _load_loops()
        given.device = "cuda" if suite == "gpu" else "cpu"
        given.results = given.results or record.RESULTS
        jobs = _jobs(given, suite)
        if given.mode or given.provider:
            asked.require_cases(_cheapest(jobs, given.device), given.mode, given.provider)
            _release(given.device)
    except asked.AskedError as error:
        parser.error(str(error))
    return _measured(jobs, given, suite)


def _measured(jobs: Sequence[Job], given: argparse.Namespace, suite: str) -> int:
    """Measure, print and record; return 0, or 1 as main does."""
    # a pipe or file has no width of its own; the table needs this much
    console = Console(width=None if sys.stdout.isatty() else TABLE_COLUMNS)
    given.where = machine.describe(given.device)
    sound, raised = True, []
    # drawn between samples: a thread would draw during them, and fail where garbage is looked through for tensors
    with Progress(*COLUMNS, console=console, transient=True, auto_refresh=False) as progress:
        # by cost, not by count: else the time left is that of the small shapes
        whole = progress.add_task(f"{suite} suite", total=sum(shapes.cost(shape) for _, shape in jobs))
        for op, shape in jobs:
            try:
                for case in cases_of(op, shape, given.device):
                    # one without providers says why
                    if given.mode in (None, case.mode) or not case.providers:
                        sound &= measure(asked.chosen(case, given.provider), given, progress)
            except Exception as error:
                raised.append(f"{op} {shapes.written(shape)}: {told(error)}")
                console.print(f"[red]raised:[/red] {escape(raised[-1])}\n")
            _release(given.device)
            progress.advance(whole, shapes.cost(shape))
    if raised:
        console.print(f"[red]{len(raised)} of {len(jobs)} raised and were left:[/red]")
        for line in raised:
            console.print(f"  {escape(line)}")
    return 0 if sound and not raised else FAILED


def _jobs(given: argparse.Namespace, suite: str) -> list[Job]:
    """Return each benchmark and shape asked for.

    Raises:
        AskedError: if they do not go together.
    """
    if given.sweep:
        asked.require_swept(given.op or (), given.shape, given.sweep)
        return shapes.sweep(given.sweep, suite)
    ops = given.op or case_names()
    asked.require_sizes(ops, given.shape or (), lambda op: shapes_of(op, None, "cpu")[0])
    return [(op, shape) for op in ops for shape in shapes_of(op, given.shape, suite)]


def _load_loops() -> None:
    """Load what many small 4-bit weights load by themselves, which would be in the middle of a sample."""
    from lora_core.cpu import compiled

    compiled.load("nf4")


def _cheapest(jobs: Sequence[Job], device: str) -> Iterator[Case]:
    """Yield the comparisons of one shape of each benchmark, and of each set of sizes; those that raise do so later."""
    chosen: dict[tuple[str, frozenset[str]], dict[str, int]] = {}
    for op, shape in sorted(jobs, key=lambda job: shapes.cost(job[1])):
        chosen.setdefault((op, frozenset(shape)), shape)
    for (op, _), shape in chosen.items():
        with contextlib.suppress(Exception):
            yield from cases_of(op, shape, device)


def _release(device: str) -> None:
    """Give back the memory of a finished comparison: one that ran out of it must not take it from the next."""
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def case_names() -> list[str]:
    """Return the names of the benchmarks there are."""
    return sorted(p.stem for p in CASES.glob("*.py") if p.stem != "__init__")


def shapes_of(op: str, shape: Sequence[dict[str, int]] | None, suite: str) -> Sequence[dict[str, int]]:
    """Return the shapes to run a benchmark on: those given, or the suite's."""
    module = importlib.import_module(f"benchmarks.cases.{op}")
    own = getattr(module, "GPU_SHAPES", module.SHAPES) if suite == "gpu" else module.SHAPES
    return shape or own


def cases_of(op: str, shape: dict[str, int], device: str) -> Iterator[Case]:
    """Yield the comparisons of one benchmark on one shape; one without providers where a package is missing."""
    module = importlib.import_module(f"benchmarks.cases.{op}")
    reason = why_none(getattr(module, "NEEDS", ()))
    if reason is not None:
        yield Case(op, "fwd", shape, "float32", None, [], _never, missing={"all of it": reason})
        return
    yield from module.cases(shape, device)


def _never(name: str) -> Check:
    raise LookupError(f"there is no provider {name}")


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program, description=__doc__.splitlines()[0])
    parser.add_argument(
        "--op", action="append", choices=case_names(), help="which benchmark; repeat for more; all by default"
    )
    parser.add_argument("--suite", choices=SUITES, help="which shapes and device; by default what this machine can do")
    parser.add_argument(
        "--shape", action="append", type=options.shape, help="M=1024,N=512,K=512,R=16 or 4096x4096 (N x K); repeatable"
    )
    parser.add_argument(
        "--sweep", choices=shapes.SWEEPS, help="instead: how the cost grows with tokens M, rank R, adapters G, model K"
    )
    parser.add_argument("--provider", action="append", help="measure these only, and this library; repeat for more")
    parser.add_argument("--mode", choices=record.MODES, help="forward, backward or both; all by default")
    parser.add_argument("--samples", type=options.count, default=SAMPLES, help="rounds of interleaved samples, at most")
    parser.add_argument("--seed", type=options.seed, default=0, help="of the order of the samples")
    parser.add_argument("--results", type=options.folder, help="folder the rows are appended in")
    return parser


if __name__ == "__main__":
    sys.exit(main())
