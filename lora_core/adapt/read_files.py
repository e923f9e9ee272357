"""Reading an adapter's folder: whole, of one generation, and never unpickled."""

from pathlib import Path
from typing import Any

from torch import Tensor

from lora_core.adapt.configuration import differences, refuse_unimplemented
from lora_core.adapt.files import CONFIG, PARTIAL, PREVIOUS, WEIGHTS, Checkpoint, embedded_config, held
from lora_core.adapt.json_text import parse_json, read_object
from lora_core.adapt.warn import warn
from lora_core.errors import CheckpointError

PICKLE = "adapter_model.bin"
# bytes of a safetensors file that say how long its header is, and the longest that is looked for a configuration
LENGTH, LONGEST_HEADER = 8, 2**24


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read an adapter's two files and make sure that they belong together. Nothing is unpickled.

    Raises:
        CheckpointError: if a file is missing, truncated or foreign, or the two are not of one generation.
        ConfigError: if the configuration was changed to what is not implemented.
    """
    _require_files(folder)
    with held(folder, to_write=False):
        written = _read_config(folder / CONFIG)
        tensors, embedded = _read_weights(folder / WEIGHTS)
        if embedded is not None and (written is None or written == embedded):
            return Checkpoint(embedded, tensors)
        if written is None:
            raise CheckpointError(f"{folder} has no {CONFIG}: want the file that was saved beside {WEIGHTS}")
        token = _interrupted_save(folder, written)
        before = None if token is None else embedded or _read_config(folder / f".{CONFIG}.{token}{PREVIOUS}")
    if token is not None:
        warn(f"saving to {folder} was interrupted: loading the checkpoint before it, which is whole")
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


def _require_files(folder: Path) -> None:
    """Raise CheckpointError unless there is such a folder, with weights that are a file."""
    try:
        if not folder.is_dir():
            what = f"{folder} is a file" if folder.exists() else f"there is no folder {folder}"
            raise CheckpointError(f"{what}: want a local folder with {CONFIG} and {WEIGHTS}; download an adapter first")
        weights = folder / WEIGHTS
        if weights.is_symlink() and not weights.exists():
            raise CheckpointError(f"{weights} is a link to {weights.readlink()}, which does not exist; want a file")
        if not weights.exists():
            raise CheckpointError(_no_weights(folder))
        for path in (weights, folder / CONFIG):
            # reading a pipe would wait for its other end
            if path.exists() and not path.is_file():
                raise CheckpointError(f"{path} is no file; want the one that was saved there")
    except OSError as error:
        raise CheckpointError(f"cannot read the folder {folder}: {error.strerror}; want one that can be read") from None


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
        return read_object(path, "a JSON object with peft_type, r, ...")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; want a file with peft_type, r, ...") from None


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return the tensors and the configuration of a file, read at once: it may be replaced, or cut off, meanwhile."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = b""
    try:
        data = path.read_bytes()
        tensors = load(data)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} ({len(data):,} bytes) cannot be read as safetensors: {error}. It is truncated or "
            "foreign: copy or save it again"
        ) from None
    except KeyError as unknown:
        (dtype,) = unknown.args
        named = (name for name, about in _header(data).items() if about.get("dtype") == dtype)
        raise CheckpointError(
            f"{path} holds {next(named, 'tensors')} as {dtype}, which cannot be read: want float32, float16 or "
            "bfloat16; save it again in one of them"
        ) from None
    return tensors, _embedded(_header(data))


def _header(start: bytes) -> dict[str, Any]:
    """Return the header of a safetensors file, which follows its length: what it says of each tensor, and more.

    Nothing where it is none, or has more in it than is read.
    """
    length = int.from_bytes(start[:LENGTH], "little")
    try:
        values = parse_json(start[LENGTH : LENGTH + length].decode())
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _embedded(header: dict[str, Any]) -> dict[str, Any] | None:
    metadata = header.get("__metadata__")
    return embedded_config(metadata) if isinstance(metadata, dict) else None


def _interrupted_save(folder: Path, written: dict[str, Any]) -> str | None:
    """Return the token of a save whose weights, which belong to this configuration, still wait to be renamed."""
    for path in folder.glob(f".{WEIGHTS}.*{PARTIAL}"):
        try:
            with path.open("rb") as file:
                header = _header(file.read(LENGTH + LONGEST_HEADER))
        # gone again, or no file
        except OSError:
            continue
        token = path.name.removesuffix(PARTIAL).rpartition(".")[2]
        # until the configuration is renamed all is as it was
        if _embedded(header) == written and not (folder / f".{CONFIG}.{token}{PARTIAL}").exists():
            return token
    return None
