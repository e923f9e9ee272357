"""Which other libraries' code can run here beside this one's, and why one cannot."""

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

# how to get each, and whether it needs a GPU; source: their installation pages
INSTALL = {
    "bitsandbytes": "pip install bitsandbytes",
    "peft": "pip install peft",
    "torchao": "pip install torchao",
    "unsloth": "pip install unsloth",
}
NEED_GPU = ("unsloth",)


@functools.cache
def why_missing(package: str, device: str) -> str | None:
    """Return why a library cannot be measured on this device, or None if it can.

    Args:
        package: its import name.
        device: "cpu" or "cuda".
    """
    if package in NEED_GPU and device == "cpu":
        return "needs a GPU"
    try:
        importlib.import_module(package)
    except ImportError as error:
        return f"{package} is not installed: {INSTALL[package]}" if error.name == package else f"cannot import: {error}"
    except Exception as error:
        return f"does not start here: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def providers(
    ours: Mapping[str, Callable[..., Any]], peers: Mapping[str, Callable[[], Callable[..., Any]]], device: str
) -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    """Return the work by provider, and why each provider that cannot run is left out.

    Args:
        ours: this project's, and PyTorch's: they run everywhere.
        peers: by the library's import name, with a suffix after a space if need be, what makes its work.
        device: "cpu" or "cuda".
    """
    works, missing = dict(ours), {}
    for name, make in peers.items():
        reason = why_missing(name.split(" ")[0], device)
        if reason is None:
            works[name] = make()
        else:
            missing[name] = reason
    return works, missing
