"""Reading JSON that anybody may have written."""

import json
from pathlib import Path
from typing import Any

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


def parse_json_file(path: Path) -> Any:
    """Return what a JSON file says, with or without the byte order mark that some editors write.

    Raises:
        ValueError: as parse_json, or if it is no UTF-8.
        OSError: if it cannot be read.
    """
    return parse_json(path.read_text(encoding="utf-8-sig"))
