"""Files that are either whole or not there."""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from lora_core.adapt.write_files import STALE_SECONDS


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file beside the path, then renames it over the path.

    Args:
        path: the file wanted; its folder is made.
        write: called with the temporary path, which has the same suffix.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _remove_stale(path)


def _remove_stale(path: Path) -> None:
    """Removes what killed processes left; a younger file may belong to another process that is writing."""
    left = re.compile(rf"\.{re.escape(path.stem)}\.\d+{re.escape(path.suffix)}")
    for file in path.parent.iterdir():
        try:
            if left.fullmatch(file.name) and time.time() - file.stat().st_mtime > STALE_SECONDS:
                file.unlink()
        except FileNotFoundError:
            continue
