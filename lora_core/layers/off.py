"""Whether a part of a model is switched off for a while."""

from typing import Any


class Off:
    """How many blocks of disable_adapter a part is in; a copy, or a pickle, of the part is in none."""

    def __init__(self) -> None:
        self.blocks = 0

    def __reduce__(self) -> Any:
        return Off, ()
