"""`lora-core bench`: the benchmarks of a source checkout."""

from pathlib import Path
from typing import Annotated

import typer

import lora_core
from lora_core.errors import LoraCoreError


def bench(
    op: Annotated[list[str] | None, typer.Option(help="Which benchmark; repeat for more; all by default.")] = None,
    suite: Annotated[str | None, typer.Option(help="cpu, gpu or static; by default what this machine can do.")] = None,
    shape: Annotated[str | None, typer.Option(help="M=1024,N=512,K=512,R=16 or 4096x4096 (N x K).")] = None,
    sweep: Annotated[str | None, typer.Option(help="How the cost grows: M, R, G (adapters) or K (model).")] = None,
    mode: Annotated[str | None, typer.Option(help="fwd, bwd or fwdbwd; all by default.")] = None,
    samples: Annotated[int | None, typer.Option(help="Rounds of interleaved samples.")] = None,
    results: Annotated[str | None, typer.Option(help="Folder the rows are appended in.")] = None,
) -> None:
    """Time this library beside its peers, in one process, and record what passes its check."""
    import importlib
    import sys

    root = checkout_root()
    arguments = [part for name in op or [] for part in ("--op", name)]
    options = {"suite": suite, "shape": shape, "sweep": sweep, "mode": mode, "samples": samples, "results": results}
    for name, value in options.items():
        if value is not None:
            arguments += [f"--{name}", str(value)]
    sys.path.insert(0, str(root))
    raise typer.Exit(importlib.import_module("benchmarks.run").main(arguments, "lora-core bench"))


def checkout_root() -> Path:
    """Return the folder of the source checkout this package runs from.

    Raises:
        LoraCoreError: if it runs from an installed wheel, which holds no benchmarks.
    """
    root = Path(lora_core.__file__).resolve().parent.parent
    if not (root / "benchmarks" / "run.py").is_file():
        raise LoraCoreError(
            f"bench: lora_core is installed in {root}, without the benchmarks; want a source checkout: clone the "
            "repository, then `make bench` there, or `pip install -e .` and this command"
        )
    return root
