"""An adapter's folder on disk: adapter_config.json and adapter_model.safetensors. A kill while writing breaks nothing.

Each file is written whole under a temporary name, then renamed over the old one, the weights last. A process killed
between the two renames leaves a new configuration beside old weights. Therefore the weights carry their own
configuration in the file's metadata, and the new weights still lie there under their temporary name: reading sees
that, and returns the old weights with the old configuration. For weights that carry none, as PEFT's, the old
configuration is kept beside them until the new weights are there.
"""

import json
import os
import secrets
import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_core.adapt.configuration import differences, refuse_unimplemented
from lora_core.adapt.json_text import parse_json, parse_json_file
from lora_core.errors import CheckpointError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
PARTIAL = ".partial"
PREVIOUS = ".previous"
METADATA_KEY = "adapter_config"

# A temporary file that nobody has written to for this long belongs to a process that is gone.
STALE_SECONDS = 3600


@dataclass(frozen=True)
class Checkpoint:
    """A configuration, and the tensors that belong to it by PEFT's names."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


def folder_path(folder: str | os.PathLike[str]) -> Path:
    """Return a folder's path.

    Raises:
        CheckpointError: if this is no path, or an empty one.
    """
    if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder) or "\0" in str(folder):
        raise CheckpointError(f"folder is {folder!r}; want the path of an adapter's folder")
    return Path(folder)


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
        if (folder / CONFIG).exists():
            shutil.copyfile(folder / CONFIG, previous)
            _sync(previous)
        new[CONFIG].write_text(text + "\n")
        save_file(tensors, new[WEIGHTS], metadata={"format": "pt", METADATA_KEY: text})
        # safetensors makes files that only their owner may read, whatever the umask
        new[WEIGHTS].chmod(new[CONFIG].stat().st_mode)
        for path in new.values():
            _sync(path)
        os.replace(new[CONFIG], folder / CONFIG)
        os.replace(new[WEIGHTS], folder / WEIGHTS)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot save an adapter in {folder}: {error}; what was there is whole. Save somewhere else, or make room"
        ) from error
    finally:
        # the configuration before goes last: until then the folder can be read
        for path in (*new.values(), previous):
            path.unlink(missing_ok=True)
    _remove_stale(folder)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read an adapter's two files and make sure that they belong together. Nothing is unpickled.

    Raises:
        CheckpointError: if a file is missing, truncated or foreign, or the two are not of one generation.
        ConfigError: if the configuration was changed to what is not implemented.
    """
    try:
        if not folder.is_dir():
            raise CheckpointError(
                f"there is no folder {folder}: want a local folder with {CONFIG} and {WEIGHTS}; download an adapter "
                "first"
            )
        if not (folder / WEIGHTS).exists():
            raise CheckpointError(_no_weights(folder))
    except OSError as error:
        raise CheckpointError(f"cannot read the folder {folder}: {error.strerror}; want one that can be read") from None
    written = _read_config(folder / CONFIG)
    tensors, embedded = _read_weights(folder / WEIGHTS)
    if embedded is not None and (written is None or written == embedded):
        return Checkpoint(embedded, tensors)
    if written is None:
        raise CheckpointError(f"{folder} has no {CONFIG}: want the file that was saved beside {WEIGHTS}")
    token = _interrupted_save(folder, written)
    if token is not None:
        warnings.warn(
            f"saving to {folder} was interrupted: loading the checkpoint before it, which is whole",
            UserWarning,
            stacklevel=3,
        )
        before = embedded or _read_config(folder / f".{CONFIG}.{token}{PREVIOUS}")
        if before is None:
            raise CheckpointError(
                f"saving to {folder} was interrupted, and the configuration of its {WEIGHTS} is gone: put back the "
                f"{CONFIG} that belongs to these weights, or save the adapter again"
            )
        return Checkpoint(before, tensors)
    if embedded is None:
        return Checkpoint(written, tensors)
    differing = differences(written, embedded)
    # what no version of this library has written was put in by hand
    refuse_unimplemented(written)
    if differing:
        told = "; ".join(f"{name} is {a!r}, the weights were saved with {b!r}" for name, (a, b) in differing.items())
        raise CheckpointError(
            f"{CONFIG} and {WEIGHTS} in {folder} are not of one generation: in {CONFIG} {told}. Put back the file "
            f"saved with these weights, or remove {CONFIG} to use the copy inside {WEIGHTS}"
        )
    return Checkpoint(written, tensors)


def _no_weights(folder: Path) -> str:
    if (folder / PICKLE).exists():
        return (
            f"{folder} holds {PICKLE}, a pickle, which can run any code when it is read and is never loaded here; want "
            f"{WEIGHTS}. Convert it where you trust it: safetensors.torch.save_file(torch.load('{PICKLE}', "
            f"weights_only=True), '{WEIGHTS}', metadata={{'format': 'pt'}})"
        )
    names = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "nothing"
    return f"{folder} has no {WEIGHTS}: want a folder saved by save_adapter or by PEFT; it holds {names}"


def _read_config(path: Path) -> dict[str, Any] | None:
    try:
        values = parse_json_file(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; want a file with peft_type, r, ...") from None
    except ValueError as error:
        raise CheckpointError(
            f"{path} is no JSON ({error}): truncated, or no adapter's; save the adapter again"
        ) from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}: want a JSON object with peft_type, r, ...")
    return values


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read as safetensors: {error}. It is truncated or "
            "foreign: copy or save it again"
        ) from None
    return tensors, embedded_config(metadata)


def embedded_config(metadata: dict[str, str]) -> dict[str, Any] | None:
    """Return the configuration inside the weights file; PEFT writes none."""
    try:
        values = parse_json(metadata.get(METADATA_KEY, "null"))
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def _interrupted_save(folder: Path, written: dict[str, Any]) -> str | None:
    """Return the token of a save whose weights, which belong to this configuration, still wait to be renamed."""
    from safetensors import SafetensorError, safe_open

    for path in folder.glob(f".{WEIGHTS}.*{PARTIAL}"):
        try:
            with safe_open(path, "pt") as file:
                if embedded_config(file.metadata() or {}) == written:
                    return path.name.removesuffix(PARTIAL).rpartition(".")[2]
        except (SafetensorError, OSError):
            continue
    return None


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
