"""Inspect whatever a path names."""

import os

from lora_core.adapt.files import CONFIG, folder_path
from lora_core.inspect.adapter import HALF_A, describe_adapter
from lora_core.inspect.files import Tensors, opened, read_json, weight_files
from lora_core.inspect.quantised import describe_quantised
from lora_core.inspect.report import Plain, Report


def inspect_path(path: str | os.PathLike[str]) -> Report:
    """Return what an adapter's folder, a model's folder or a safetensors file holds. Nothing is unpickled.

    Args:
        path: the folder or file.
    Raises:
        CheckpointError: if it is missing, a pickle, truncated or foreign.
    """
    place = folder_path(path)
    files = weight_files(place)
    config_file = files[0].parent / CONFIG
    with opened(files) as tensors:
        # beside a single file that holds no pairs, a configuration is some other adapter's
        adapter = _holds_pairs(tensors) or (place.is_dir() and config_file.exists())
        written = read_json(config_file) if adapter else None
        sizes = {f.name: f.stat().st_size for f in files}
        if written is not None:
            sizes[CONFIG] = config_file.stat().st_size
        report = Report(path=str(place), kind="adapter" if adapter else "checkpoint", files=sizes)
        used = describe_adapter(report, written, tensors) if adapter else set()
        used |= describe_quantised(report, tensors)
        for name in tensors.names():
            if name not in used:
                report.plain.append(Plain(name, tensors.shape(name), tensors.dtype(name)))
    return report


def _holds_pairs(tensors: Tensors) -> bool:
    return any(HALF_A.search(name) or ".lora_A." in name for name in tensors.names())
