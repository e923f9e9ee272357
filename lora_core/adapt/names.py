"""What a list of names, or an expression, means: PEFT's rules."""

import re
from collections.abc import Sequence

ALL_LINEAR = "all-linear"


def matches(name: str, wanted: Sequence[str] | str) -> bool:
    """Say whether a module name is one of the wanted."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == w or name.endswith(f".{w}") for w in wanted)
