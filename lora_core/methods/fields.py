"""Configuration classes that name a misspelt field instead of only refusing it."""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from lora_core.errors import ConfigError

Config = TypeVar("Config")


def checks_field_names(cls: type[Config]) -> type[Config]:
    """Decorate a dataclass: an unknown keyword raises ConfigError with the nearest known field.

    The class may say more about some names in `HINTS`, {name: what to do}.
    """
    plain_init: Callable[..., None] = cls.__init__
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]

    @functools.wraps(plain_init)
    def init(self: Config, **values: Any) -> None:
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ConfigError(unknown_field(cls.__name__, unknown[0], known, getattr(cls, "HINTS", {})))
        plain_init(self, **values)

    setattr(cls, "__init__", init)  # noqa: B010
    return cls


def all_of(values: Any, kind: type) -> bool:
    """Say whether this is a collection, other than a string, of nothing but this kind."""
    return isinstance(values, Collection) and not isinstance(values, str) and all(type(v) is kind for v in values)


def is_names(values: Any) -> bool:
    """Say whether this is a collection of strings."""
    return all_of(values, str)


def unknown_field(owner: str, given: str, known: list[str], hints: Mapping[str, str]) -> str:
    """Return the message for a field that does not exist."""
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.6)
    hint = f"{hints[given]}. " if given in hints else f"did you mean {near[0]!r}? " if near else ""
    return f"{owner} has no field {given!r}: {hint}The fields are {', '.join(known)}"
