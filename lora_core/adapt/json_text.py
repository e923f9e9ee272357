"""Reading JSON that anybody may have written."""

import json
from pathlib import Path
from typing import Any

from lora_core.errors import CheckpointError

# levels of a JSON text; configurations have three or four
DEEPEST = 64


def parse_json(text: str) -> Any:
    """Return what a JSON text says.

    Raises:
        ValueError: if it is none, or so deep that what walks it would overflow the stack.
    """
    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level, depth = [values], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise ValueError("nested too deeply")
        inside = (value.values() if isinstance(value, dict) else value for value in level)
        level = [part for parts in inside if not isinstance(parts, (str, int, float, type(None))) for part in parts]
    return values


def read_object(path: Path, what: str = "a JSON object") -> dict[str, Any] | None:
    """Return the object in a JSON file, or None if there is no such file; what tells in a message what it should be.

    Raises:
        CheckpointError: if it holds none.
        OSError: if it cannot be read.
    """
    try:
        # some editors write a byte order mark
        values = parse_json(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON ({error}): truncated or foreign; save it again") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}; want {what}; save it again")
    return values
