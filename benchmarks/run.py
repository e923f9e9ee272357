"""Run benchmarks: `python -m benchmarks.run`, or `--op nf4_quantize --shape 4096x4096` for a part.

Checks every provider, measures its peak memory and its time beside its rivals', appends a row each to
benchmarks/results/<op>.jsonl, and prints the rows as a table. A provider that cannot run here is listed with the
reason; one that raises, or a comparison that does, is listed and the rest goes on. The suite is what this machine can
do: "gpu" where there is one, else "cpu"; "static" needs neither and predicts from the compiled kernels
(benchmarks/static.py).
"""

import argparse
import dataclasses
import gc
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import heap, machine, record, shapes
from benchmarks.case import Case, Check
from benchmarks.measure import measure, sizes
from benchmarks.peers import told, why_none

CASES = Path(__file__).parent / "cases"
# rounds of a comparison, at most
SAMPLES = 15
TABLE_COLUMNS = 120
FAILED = 1
SUITES = ("cpu", "gpu", "static")
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
    options = _parser(program).parse_args(arguments)
    # the profiler that counts memory prints trace points otherwise; the hub is not asked for anything
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # a pipe or file has no width of its own; the table needs this much
    console = Console(width=None if sys.stdout.isatty() else TABLE_COLUMNS)
    suite = options.suite or ("gpu" if _has_gpu() else "cpu")
    if suite == "static":
        from benchmarks import static

        return static.main(
            [part for name in static.kernels_of(options.op or []) for part in ("--kernel", name)], program
        )
    options.device = "cuda" if suite == "gpu" else "cpu"
    if suite == "gpu" and not _has_gpu():
        sys.stderr.write(f"{program}: the gpu suite needs a CUDA device; none is here. --suite cpu runs without\n")
        return FAILED
    if suite == "cpu":
        heap.keep_freed_memory()
    if options.sweep:
        jobs = [(op, shape) for op, shape in shapes.sweep(options.sweep, suite) if op in (options.op or [op])]
    else:
        jobs = [(op, shape) for op in options.op or case_names() for shape in shapes_of(op, options.shape, suite)]
    options.where = machine.describe(options.device)
    sound, raised = True, []
    with Progress(*COLUMNS, console=console, transient=True) as progress:
        # by cost, not by count: else the time left is that of the small shapes
        whole = progress.add_task(f"{suite} suite", total=sum(shapes.cost(shape) for _, shape in jobs))
        for op, shape in jobs:
            try:
                for case in cases_of(op, shape, options.device):
                    if options.mode is None or case.mode == options.mode:
                        sound &= measure(_chosen(case, options.provider), options, progress)
            except Exception as error:
                raised.append(f"{op} {sizes(shape)}: {told(error)}")
                console.print(f"[red]raised:[/red] {escape(raised[-1])}\n")
            _release(options.device)
            progress.advance(whole, shapes.cost(shape))
    if raised:
        console.print(f"[red]{len(raised)} of {len(jobs)} raised and were left:[/red]")
        for line in raised:
            console.print(f"  {escape(line)}")
    return 0 if sound and not raised else FAILED


def _release(device: str) -> None:
    """Give back the memory of a finished comparison: one that ran out of it must not take it from the next."""
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


def _chosen(case: Case, providers: Sequence[str] | None) -> Case:
    """Return the case with these providers only, its first, and the claims about them."""
    if providers is None:
        return case
    kept = [p for i, p in enumerate(case.providers) if i == 0 or p.name in providers]
    claims = tuple(c for c in case.claims if not c.against or c.against in {p.name for p in kept})
    return dataclasses.replace(case, providers=kept, claims=claims)


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


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; want a whole number of at least 1")
    return int(text)


def _shape(text: str) -> dict[str, int]:
    """Return shapes.parse(text), whose reason argparse prints only as an error of its own."""
    try:
        return shapes.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program, description=__doc__.splitlines()[0])
    parser.add_argument(
        "--op", action="append", choices=case_names(), help="which benchmark; repeat for more; all by default"
    )
    parser.add_argument("--suite", choices=SUITES, help="which shapes and device; by default what this machine can do")
    parser.add_argument(
        "--shape", action="append", type=_shape, help="M=1024,N=512,K=512,R=16 or 4096x4096 (N x K); repeatable"
    )
    parser.add_argument(
        "--sweep", choices=shapes.SWEEPS, help="instead: how the cost grows with tokens M, rank R, adapters G, model K"
    )
    parser.add_argument("--provider", action="append", help="measure these only, and this library; repeat for more")
    parser.add_argument("--mode", choices=record.MODES, help="forward, backward or both; all by default")
    parser.add_argument("--samples", type=_count, default=SAMPLES, help="rounds of interleaved samples, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the samples")
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder the rows are appended in")
    return parser


if __name__ == "__main__":
    sys.exit(main())
