"""The index of a model that is spread over several files, against the files that are there."""

from pathlib import Path
from typing import Any

from lora_core.adapt.json_text import read_object
from lora_core.adapt.names import first_few
from lora_core.errors import CheckpointError
from lora_core.inspect.files import SHOWN_NAMES, Tensors
from lora_core.inspect.report import Report

INDEX = "*.safetensors.index.json"
SINGLE = "model.safetensors"


def check_index(report: Report, folder: Path, tensors: Tensors) -> None:
    """Add to report what a loader that follows the folder's index would miss.

    Args:
        report: changed in place.
        folder: of the model.
        tensors: of all its files.
    """
    # a model in one file is loaded from it, whatever an index says
    for file in [] if (folder / SINGLE).exists() else sorted(folder.glob(INDEX)):
        report.files[file.name] = file.stat().st_size
        try:
            found = _weight_map(file)
        except CheckpointError as error:
            report.problems.append(str(error))
            continue
        absent = sorted({shard for shard in found.values() if shard not in report.files})
        if absent:
            report.problems.append(
                f"{file.name} names {first_few(absent, SHOWN_NAMES)}, not in the folder: copy or download them"
            )
        lost = sorted(n for n, shard in found.items() if shard in report.files and tensors.file_of(n) != shard)
        if lost:
            report.problems.append(
                f"{file.name} places {first_few(lost, SHOWN_NAMES)} in a file without it: save the model again"
            )


def _weight_map(file: Path) -> dict[str, str]:
    found: Any = (read_object(file) or {}).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(shard, str) for shard in found.values()):
        raise CheckpointError(f"{file} has no weight_map of tensors' names to files' names: save the model again")
    return found
