"""Opening what a path names: safetensors and JSON only. A pickle can run any code when read, so none ever is."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_core.adapt.files import CONFIG, WEIGHTS
from lora_core.errors import CheckpointError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

# a zip archive, which torch.save writes, and the start of a pickle of protocol 2 to 5
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")

# a model's weights, as transformers calls them in one format and the other
PICKLED_MODEL, MODEL = "pytorch_model.bin", "model.safetensors"

SHOWN_NAMES = 10

# safetensors' names of dtypes, as PyTorch calls them
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


class Tensors:
    """The tensors of a few safetensors files by name, each read only when asked for.

    Args:
        files: open safetensors files by path.
    """

    def __init__(self, files: dict[Path, Any]) -> None:
        self.metadata: dict[str, str] = {}
        self._owner: dict[str, Any] = {}
        self._places: dict[str, str] = {}
        for path, file in files.items():
            self.metadata.update(file.metadata() or {})
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                if name in self._owner:
                    raise CheckpointError(
                        f"{path} holds {name}, which another file of the folder holds too; remove one"
                    )
                self._owner[name] = file
                self._places[name] = path.name

    def names(self) -> list[str]:
        """Return the tensors' names in order."""
        return sorted(self._owner)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return tuple(self._owner[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Return a tensor's dtype without reading it."""
        code = self._owner[name].get_slice(name).get_dtype()
        return DTYPES.get(code, code.lower())

    def read(self, name: str) -> Tensor:
        """Return a tensor.

        Raises:
            CheckpointError: if its dtype is one that PyTorch does not have.
        """
        from safetensors import SafetensorError

        try:
            tensor: Tensor = self._owner[name].get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self._places[name]}: {name} cannot be read: {error}; save it anew") from None
        return tensor

    def file_of(self, name: str) -> str | None:
        """Return the name of the file that holds a tensor, or None if none does."""
        return self._places.get(name)

    def __contains__(self, name: str) -> bool:
        return name in self._owner


def weight_files(path: Path) -> list[Path]:
    """Return the safetensors files that a folder or a file name stands for.

    Raises:
        CheckpointError: if there is none, or only pickles.
        OSError: if it cannot be read.
    """
    # a link that leads nowhere does not exist, and is there all the same
    if path.is_symlink() and not path.exists():
        raise CheckpointError(f"{path} is a link to {path.readlink()}, which does not exist; want a file or a folder")
    if not path.exists():
        raise CheckpointError(f"there is no {path}; want an adapter's folder, a model's folder or a .safetensors file")
    if path.is_file():
        _refuse_pickle(path)
        if path.suffix == ".json":
            raise CheckpointError(
                f"{path} is by its name JSON, which holds no tensors; want the folder that it lies in"
            )
        return [path]
    if not path.is_dir():
        raise CheckpointError(f"{path} is neither a file nor a folder; want a .safetensors file or a folder of them")
    if (path / WEIGHTS).exists():
        return [path / WEIGHTS]
    # opening a pipe would wait for its other end
    found = sorted(p for p in path.glob("*.safetensors") if not p.is_fifo())
    if (path / CONFIG).exists():
        found = []
    if found:
        return found
    pickles = [p for p in sorted(path.iterdir()) if p.suffix in PICKLES]
    if pickles:
        _refuse_pickle(pickles[0])
    names = ", ".join(sorted(p.name for p in path.iterdir())[:SHOWN_NAMES]) or "nothing"
    if (path / CONFIG).exists():
        raise CheckpointError(f"{path} has no {WEIGHTS} beside its {CONFIG}, it holds {names}; want the adapter's")
    raise CheckpointError(f"{path} has no safetensors file, it holds {names}; want {WEIGHTS} or {MODEL}")


@contextmanager
def opened(paths: list[Path]) -> Iterator[Tensors]:
    """Open safetensors files together.

    Raises:
        CheckpointError: if one is truncated or no safetensors file.
        OSError: if one cannot be read; safetensors says of every such file that it does not exist.
    """
    from contextlib import ExitStack

    from safetensors import SafetensorError, safe_open

    with ExitStack() as stack:
        files = {}
        for path in paths:
            path.open("rb").close()
            try:
                files[path] = stack.enter_context(safe_open(path, "pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path} ({path.stat().st_size:,} bytes) cannot be read as safetensors: {error}. It is truncated "
                    "or foreign: copy or save it again"
                ) from None
        yield Tensors(files)


def _refuse_pickle(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(9)
    # a safetensors file starts with 8 bytes of length, which may look like anything, and the brace of its JSON header
    looks_pickled = start.startswith(PICKLE_STARTS) and not start.endswith(b"{")
    if path.suffix in PICKLES or looks_pickled:
        kind = "a pickle" if looks_pickled else "by its name a pickle"
        own = path.suffix in PICKLES and path.name != PICKLED_MODEL
        name = path.with_suffix(".safetensors").name if own else MODEL
        raise CheckpointError(
            f"{path} is {kind}, which can run any code when it is read and is never opened here; want safetensors. "
            "Convert it where you trust it: safetensors.torch.save_file(torch.load(file, weights_only=True), "
            f"{name!r}), in the same folder"
        )
