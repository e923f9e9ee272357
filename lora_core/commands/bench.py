"""`lora-core bench`: the benchmarks of a source checkout."""

from pathlib import Path

import typer

import lora_core
from lora_core.errors import LoraCoreError

# the benchmarks have their own options, --help among them
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def bench(context: typer.Context) -> None:
    """Time this library beside its peers and record what passes its check, in a checkout; --help has the options."""
    import importlib
    import sys

    sys.path.insert(0, str(checkout_root()))
    raise typer.Exit(importlib.import_module("benchmarks.run").main(context.args, "lora-core bench"))


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
