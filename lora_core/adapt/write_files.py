"""Writing an adapter's folder. A kill at any moment breaks nothing.

Each file is written whole under a temporary name, then renamed over the old one, the weights last. A process killed
between the two renames leaves a new configuration beside old weights. Therefore the weights carry their own
configuration in the file's metadata, and the new weights still lie there under their temporary name: reading sees
that, and returns the old weights with the old configuration. For weights that carry none, as PEFT's, the old
configuration is kept beside them until the new weights are there.
"""

import contextlib
import json
import os
import secrets
import shutil
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_core.adapt.files import CONFIG, METADATA_KEY, PARTIAL, PREVIOUS, WEIGHTS, held
from lora_core.errors import CheckpointError

# A temporary file that nobody has written to for this long belongs to a process that is gone.
STALE_SECONDS = 3600


def write_checkpoint(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write an adapter's two files; a process killed at any moment leaves the folder loadable, old or new.

    Args:
        folder: made if it does not exist; its other files are left alone.
        config: the values of adapter_config.json.
        tensors: on the CPU, contiguous, none sharing memory with another.
    Raises:
        CheckpointError: if the folder is a file, or something cannot be written; what was there before is whole.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(f"{folder} is a file: want the name of a folder, new or not, to save the adapter in")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the folder {folder}: {error.strerror}; save somewhere else") from None
    # the fields alone are sorted: inside one, the order may mean something
    text = json.dumps(dict(sorted(config.items())), indent=2)
    token = secrets.token_hex(4)
    new = {name: folder / f".{name}.{token}{PARTIAL}" for name in (CONFIG, WEIGHTS)}
    previous = folder / f".{CONFIG}.{token}{PREVIOUS}"
    try:
        new[CONFIG].write_text(text + "\n")
        save_file(tensors, new[WEIGHTS], metadata={"format": "pt", METADATA_KEY: text})
        # safetensors makes files that only their owner may read, whatever the umask
        new[WEIGHTS].chmod(new[CONFIG].stat().st_mode)
        for path in new.values():
            _sync(path)
        with held(folder, to_write=True):
            _replace(folder, new, previous)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot save an adapter in {folder}: {error}; what was there is whole. Save somewhere else, or make room"
        ) from error
    finally:
        # what a configuration that could not be put back is read by stays
        if not (previous.exists() and new[WEIGHTS].exists() and not new[CONFIG].exists()):
            for path in (*new.values(), previous):
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
    _remove_stale(folder)


def _replace(folder: Path, new: dict[str, Path], previous: Path) -> None:
    """Rename both files over the old ones. Where that fails, the old configuration is put back beside its weights."""
    config = folder / CONFIG
    if config.exists():
        shutil.copy(config, previous)
        _sync(previous)
    try:
        os.replace(new[CONFIG], config)
        os.replace(new[WEIGHTS], folder / WEIGHTS)
    except BaseException:
        if new[WEIGHTS].exists() and not new[CONFIG].exists():
            if previous.exists():
                os.replace(previous, config)
            else:
                config.unlink()
        raise
    # both are there, whether this folder can be synchronised or not
    with contextlib.suppress(OSError):
        _sync(folder)


def _remove_stale(folder: Path) -> None:
    """Remove what killed processes left; a younger file may belong to another process that is saving."""
    for path in (*folder.glob(f".adapter_*{PARTIAL}"), *folder.glob(f".adapter_*{PREVIOUS}")):
        try:
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()
        except OSError:
            # gone already, another user's, or no file: it is in nobody's way
            continue


def _sync(path: Path) -> None:
    """Have the disk hold what was written, so that a rename never comes before the contents."""
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
