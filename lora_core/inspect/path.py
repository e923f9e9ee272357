"""Inspect whatever a path names."""

import os
from pathlib import Path

from lora_core.adapt.files import CONFIG, folder_path
from lora_core.adapt.finite import is_finite
from lora_core.adapt.json_text import read_object
from lora_core.errors import CheckpointError
from lora_core.inspect.adapter import HALF, describe_adapter
from lora_core.inspect.files import Tensors, opened, weight_files
from lora_core.inspect.foreign import note_foreign
from lora_core.inspect.quantised import describe_quantised
from lora_core.inspect.report import Plain, Report
from lora_core.inspect.shards import check_index


def inspect_path(path: str | os.PathLike[str]) -> Report:
    """Return what an adapter's folder, a model's folder or a safetensors file holds. Nothing is unpickled.

    Args:
        path: the folder or file.
    Raises:
        CheckpointError: if it is missing, not to be read, a pickle, truncated or foreign.
    """
    place = folder_path(path)
    try:
        return _inspect(place)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise CheckpointError(
            f"{error.filename or place} cannot be read: {why}; want a file or folder that can"
        ) from None


def _inspect(place: Path) -> Report:
    files = weight_files(place)
    config_file = files[0].parent / CONFIG
    with opened(files) as tensors:
        # beside a single file that holds no pairs, a configuration is some other adapter's
        adapter = _holds_pairs(tensors) or (place.is_dir() and config_file.exists())
        written = read_object(config_file) if adapter else None
        sizes = {f.name: f.stat().st_size for f in files}
        if written is not None:
            sizes[CONFIG] = config_file.stat().st_size
        report = Report(path=str(place), kind="adapter" if adapter else "checkpoint", files=sizes)
        if not tensors.names():
            report.problems.append("there is no tensor in it: nothing can be loaded; save it again")
        if place.is_dir() and not adapter:
            check_index(report, place, tensors)
        used = describe_adapter(report, written, tensors) if adapter else set()
        used |= describe_quantised(report, tensors)
        note_foreign(report, tensors)
        for name in tensors.names():
            if name not in used:
                report.plain.append(Plain(name, tensors.shape(name), tensors.dtype(name)))
                # a whole model's weights are listed by the file's header, and not read
                if adapter and not is_finite(tensors.read(name)):
                    report.problems.append(f"{name} holds NaN or infinity; train again with a smaller learning rate")
    return report


def _holds_pairs(tensors: Tensors) -> bool:
    return any(HALF.search(name) or ".lora_A." in name for name in tensors.names())
