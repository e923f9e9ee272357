"""What of the comparisons a run is asked for, and what of it cannot be measured, told before anything is."""

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Sequence

from benchmarks import options, shapes
from benchmarks.case import Case

# what a suite that measures nothing does without
OF_MEASUREMENTS = ("shape", "sweep", "mode", "provider", "samples", "seed")


class AskedError(ValueError):
    """A run is asked for what it cannot measure."""


def require_sizes(ops: Iterable[str], given: Iterable[dict[str, int]], wanted: Callable[[str], Iterable[str]]) -> None:
    """Raise AskedError unless every shape has the sizes that every operation wants."""
    ops = list(ops)
    for shape in given:
        lacks = "; ".join(f"{names} of {op}" for op in ops if (names := options.lacking(shape, wanted(op))))
        if lacks:
            raise AskedError(
                f"--shape {shapes.written(shape, ',')} lacks {lacks}: give all sizes, or choose operations by --op"
            )


def require_swept(ops: Iterable[str], given: Sequence[dict[str, int]] | None, name: str) -> None:
    """Raise AskedError if other operations than the sweep's are asked for, or shapes beside its own."""
    if given:
        raise AskedError(f"--sweep {name} has shapes of its own: leave out --shape, or the sweep")
    swept = shapes.SWEEPS[name][0]
    others = [op for op in ops if op != swept]
    if others:
        raise AskedError(f"--sweep {name} is of {swept}, not of {', '.join(others)}: leave out --op, or the sweep")


def require_cases(cases: Iterable[Case], mode: str | None, providers: Sequence[str] | None) -> None:
    """Raise AskedError unless a case is of the mode, and each provider is in one that is; the first such cases suffice.

    A provider that cannot run here counts: the run says why. So does a case without any.
    """
    modes: set[str] = set()
    names: set[str] = set()
    for case in (case for case in cases if case.providers):
        modes.add(case.mode)
        if mode in (None, case.mode):
            names.update(case.missing, (p.name for p in case.providers))
        if mode in (None, *modes) and names.issuperset(providers or ()):
            return
    if mode is not None and modes and mode not in modes:
        raise AskedError(f"--mode {mode}: nothing would be measured; there is {', '.join(sorted(modes))}")
    unknown = [name for name in providers or () if name not in names]
    if names and unknown:
        raise AskedError(f"--provider {', '.join(unknown)}: no comparison has it; there are {', '.join(sorted(names))}")


def of_static(given: argparse.Namespace, parser: argparse.ArgumentParser, ops: Iterable[str]) -> list[str]:
    """Return the arguments of the suite that predicts from the compiled kernels.

    Args:
        given: the options of a run.
        parser: what parsed them, which knows those left at their defaults.
        ops: every operation there is.

    Raises:
        AskedError: for an option about measuring, or an operation without kernels of its own.
    """
    from benchmarks.codegen import kernel_names
    from benchmarks.static import kernels_of

    about = [f"--{name}" for name in OF_MEASUREMENTS if getattr(given, name) != parser.get_default(name)]
    if about:
        raise AskedError(
            f"the static suite measures nothing: leave out {', '.join(about)}; it takes --op and --results"
        )
    known = set(kernel_names())
    predicted = [op for op in ops if known.issuperset(kernels_of([op]))]
    others = [op for op in given.op or () if op not in predicted]
    if others:
        raise AskedError(
            f"--op {', '.join(others)}: there is no kernel to predict for; the static suite predicts for "
            f"{', '.join(predicted)}"
        )
    arguments = [part for kernel in kernels_of(given.op or ()) for part in ("--kernel", kernel)]
    return arguments if given.results is None else [*arguments, "--results", str(given.results)]


def chosen(case: Case, providers: Sequence[str] | None) -> Case:
    """Return the case with these providers only, its first, and the claims about them."""
    if providers is None:
        return case
    kept = [p for i, p in enumerate(case.providers) if i == 0 or p.name in providers]
    claims = tuple(c for c in case.claims if not c.against or c.against in {p.name for p in kept})
    return dataclasses.replace(case, providers=kept, claims=claims)
