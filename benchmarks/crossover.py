"""Measure where one fused product beats a library's and an addition: `python -m benchmarks.crossover` on a GPU.

Times both paths of a LoRA linear layer's forward on the given shapes, side by side, and writes what it found beside
what the file says of other devices. The library reads the file that LORA_CORE_CROSSOVER names, else
kernels/crossover.json.
"""

import argparse
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import options, shapes
from benchmarks.case import CheckError, Provider
from benchmarks.rounding import within_rounding
from benchmarks.timing import interleave

SAMPLES = 15
TOKENS = (1, 16, 64, 512, 2048, 8192)
# N x K of attention and feed-forward layers of Llama-3-8B and -70B; source: their config.json
WEIGHTS = ((1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192))
RANKS = (16, 64)
DTYPES = ("bfloat16", "float16")
SCALING = 2.0


class KeptError(ValueError):
    """A file of measurements cannot be read, so must not be written."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, and print a line for each shape.

    Returns:
        1 where some shape could not be measured, 2 where there is nothing to measure on, or to write.
    """
    import torch

    given = _given(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("benchmarks.crossover: there is no GPU here to measure on\n")
        return 2
    if given.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        sys.stderr.write("benchmarks.crossover: set TRITON_INTERPRET=1 to run kernels on a CPU\n")
        return 2
    from lora_core.kernels import crossover

    output = given.output or Path(os.environ.get(crossover.VARIABLE) or crossover.SHIPPED)
    found: list[Any] = []
    missed = 0
    try:
        # before anything is measured that could not be written
        kept(output)
        for dtype, shape in itertools.product(given.dtype or DTYPES, given.shape or every_shape()):
            try:
                row = measure(dtype, shape, given.device, given.samples)
            except (CheckError, torch.cuda.OutOfMemoryError) as error:
                # what other shapes take is worth knowing all the same
                missed += 1
                sys.stderr.write(f"benchmarks.crossover: {dtype} {shapes.written(shape)} not measured: {error}\n")
                continue
            found.append(row)
            print(
                f"{dtype} M={row.m} N={row.n} K={row.k} R={row.r}: fused {row.fused_ms:.4g} ms, "
                f"library {row.library_ms:.4g} ms: {row.faster}",
                flush=True,
            )
            write(output, found)
    except KeptError as error:
        sys.stderr.write(f"benchmarks.crossover: {error}\n")
        return 2
    return 1 if missed else 0


def _given(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crossover", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu under TRITON_INTERPRET=1 to try the tool out")
    parser.add_argument("--shape", type=options.shape, action="append", help="M=512,N=4096,K=4096,R=16; repeatable")
    parser.add_argument("--dtype", action="append", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--samples", type=options.count, default=SAMPLES)
    parser.add_argument("--output", type=Path, help="the file to write; by default the one the library reads")
    given = parser.parse_args(arguments)
    for shape in given.shape or ():
        lacks = options.lacking(shape, "MNKR")
        if lacks:
            parser.error(f"--shape {shapes.written(shape, ',')} lacks {lacks}: want M=512,N=4096,K=4096,R=16")
    return given


def every_shape() -> list[dict[str, int]]:
    """Return the shapes measured by default."""
    return [dict(zip("MNKR", (m, *w, r), strict=True)) for w, m, r in itertools.product(WEIGHTS, TOKENS, RANKS)]


def measure(dtype: str, shape: dict[str, int], device: str, samples: int) -> Any:
    """Return the Measurement of one shape.

    Raises:
        CheckError: if a path's result is out of tolerance: then its time says nothing.
    """
    import torch

    from lora_core.kernels.crossover import PATHS, Measurement, device_name
    from lora_core.kernels.lora_linear import launch_lora_linear

    m, n, k, r = (shape[name] for name in "MNKR")
    torch.manual_seed(0)
    x, weight, lora_a, lora_b = (
        torch.randn(*size, device=device).to(getattr(torch, dtype)) for size in ((m, k), (n, k), (r, k), (n, r))
    )
    runs = {p: partial(launch_lora_linear, x, weight, None, lora_a, lora_b, SCALING, 0.0, None, p) for p in PATHS}
    wide = [t.double() for t in (x, weight, lora_a, lora_b)]
    parts, of_magnitude = ((x @ w.T, SCALING * x @ a.T @ b.T) for x, w, a, b in (wide, [t.abs() for t in wide]))
    truth, magnitude = sum(parts), sum(of_magnitude)
    for path, run in runs.items():
        check = within_rounding(run()[0], truth, magnitude, k + r + 2, roundings=3, parts=parts)
        if not check.passed:
            raise CheckError(f"{path} path, {dtype} {shape}: {check.reason}")
    del truth, magnitude, parts, of_magnitude, wide
    *_, timings = interleave([Provider(path, run) for path, run in runs.items()], samples, device)
    times = {f"{path}_ms": timings[path].median_ms for path in PATHS}
    return Measurement(device_name(x.device), dtype, m, n, k, r, **times)


def kept(path: Path) -> tuple[Any, ...]:
    """Return the measurements that a file holds; none where there is no such file yet.

    Raises:
        KeptError: if it cannot be read, as writing it would lose what it holds, or if its folder is missing.
    """
    from lora_core.kernels.crossover import load

    try:
        if path.exists():
            return load(path)
    except (OSError, ValueError, TypeError) as error:
        raise KeptError(
            f"{path} cannot be read ({error}), and writing it would lose what it holds: mend or move it, or give "
            "another --output"
        ) from error
    if not path.absolute().parent.is_dir():
        raise KeptError(f"{path}: there is no folder {path.parent}: make it, or give another --output")
    return ()


def write(path: Path, found: list[Any]) -> None:
    """Put these measurements in a file, in place of what it had for the same device, dtype and sizes.

    Raises:
        KeptError: as kept does.
    """

    def about(row: Any) -> tuple[Any, ...]:
        return row.device, row.dtype, row.n, row.k, row.r, row.m

    rows = {about(row): row for row in (*kept(path), *found)}
    lines = [json.dumps(dataclasses.asdict(rows[key])) for key in sorted(rows)]
    text = "[\n" + ",\n".join(lines) + "\n]\n"
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


if __name__ == "__main__":
    sys.exit(main())
