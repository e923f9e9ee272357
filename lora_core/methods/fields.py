"""Configuration classes that name a misspelt field instead of only refusing it."""

import dataclasses
import difflib
import functools
from typing import Any, TypeVar

from lora_core.errors import ConfigError

Config = TypeVar("Config", bound=type)


def checks_field_names(cls: Config) -> Config:
    """Decorate a dataclass: an unknown keyword raises ConfigError with the nearest known field."""
    plain_init = cls.__init__
    known = [f.name for f in dataclasses.fields(cls)]

    @functools.wraps(plain_init)
    def init(self: Any, **values: Any) -> None:
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ConfigError(unknown_field(cls.__name__, unknown[0], known))
        plain_init(self, **values)

    cls.__init__ = init  # type: ignore[method-assign,misc]
    return cls


def unknown_field(owner: str, given: str, known: list[str]) -> str:
    """Return the message for a field that does not exist."""
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{owner} has no field {given!r}: {hint}The fields are {', '.join(known)}"
