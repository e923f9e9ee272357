"""Which other libraries' code can run here beside this one's, and why one cannot."""

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Peer:
    """A provider that takes packages this project does without, or a machine that not everybody has.

    Args:
        needs: import names of all packages it takes; `pip install` calls them the same.
        make: returns its work, once they are there.
        unfit: why it cannot run here, whatever is installed; empty where it can.
    """

    needs: tuple[str, ...]
    make: Callable[[], Any]
    unfit: str = ""


@functools.cache
def why_missing(package: str) -> str | None:
    """Return why a package, by its import name, cannot be used here, or None if it can."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        if error.name == package:
            return f"{package} is not installed: pip install {package}"
        return f"{package} does not import: {told(error)}"
    except Exception as error:
        return f"{package} does not start here: {told(error)}"
    return None


def why_none(needs: Sequence[str]) -> str | None:
    """Return why these packages cannot be used together, or None if they can."""
    return next((reason for package in needs if (reason := why_missing(package))), None)


def told(error: BaseException) -> str:
    """Return an exception in one line."""
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def providers(ours: Mapping[str, Any], peers: Mapping[str, Peer]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the work by provider, and why each provider that cannot be built is left out.

    Args:
        ours: this project's, and PyTorch's that run everywhere.
        peers: the others, by the provider's name.
    """
    works, missing = dict(ours), {}
    for name, peer in peers.items():
        reason = peer.unfit or why_none(peer.needs)
        if reason is None:
            try:
                works[name] = peer.make()
            except Exception as error:
                reason = f"cannot be built here: {told(error)}"
        if reason is not None:
            missing[name] = reason
    return works, missing
