"""An adapter's folder on disk: adapter_config.json and adapter_model.safetensors, and who may touch it when."""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_core.adapt.json_text import parse_json
from lora_core.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows, where a file that is open is not replaced anyway
    fcntl = None  # type: ignore[assignment]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PARTIAL = ".partial"
PREVIOUS = ".previous"
METADATA_KEY = "adapter_config"

# two files are renamed, or read, in less
LONGEST_WAIT_S = 10.0


@dataclass(frozen=True)
class Checkpoint:
    """A configuration, and the tensors that belong to it by PEFT's names."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


def folder_path(folder: str | os.PathLike[str]) -> Path:
    """Return a folder's path.

    Raises:
        CheckpointError: if this is no path, or an empty one, or one that no system has.
    """
    try:
        path = os.fspath(folder)
        if isinstance(path, str) and path and b"\0" not in os.fsencode(path):
            return Path(path)
    except (TypeError, UnicodeEncodeError):
        pass
    raise CheckpointError(f"folder is {folder!r}; want the path of an adapter's folder")


@contextlib.contextmanager
def held(folder: Path, *, to_write: bool) -> Iterator[None]:
    """Keep the two files of a folder together: one process replaces them, or several read them.

    Among processes that ask, this library's, and where the file system knows locks; a killed one lets go. Whoever waits
    too long, as in a handler of a signal that came while this thread saved, goes on without.
    """
    with contextlib.ExitStack() as stack:
        # a folder that cannot be opened, or a file system without locks
        with contextlib.suppress(OSError):
            if fcntl is not None:
                descriptor = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, descriptor)
                _lock(descriptor, fcntl.LOCK_EX if to_write else fcntl.LOCK_SH)
                # by itself a process forked meanwhile would keep it
                stack.callback(fcntl.flock, descriptor, fcntl.LOCK_UN)
        yield


def _lock(descriptor: int, kind: int) -> None:
    end = time.monotonic() + LONGEST_WAIT_S
    while True:
        try:
            return fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise
        time.sleep(0.005)


def embedded_config(metadata: dict[str, str]) -> dict[str, Any] | None:
    """Return the configuration inside the weights file; PEFT writes none."""
    try:
        values = parse_json(metadata.get(METADATA_KEY, "null"))
    # no JSON, or, in a file that nobody has checked, no text
    except (ValueError, TypeError):
        return None
    return values if isinstance(values, dict) else None
