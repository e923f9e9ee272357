"""Checks of whole numbers that sizes are made of."""

import reprlib

from lora_core.errors import ConfigError

# far beyond any model or batch, and small enough that bytes, products of a few sizes, are still finite as floats
LARGEST_SIZE = 2**32


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raises ConfigError unless value is a whole number from `least` to LARGEST_SIZE."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} is {reprlib.repr(value)}; want a whole number of at least {least}")
    if value > LARGEST_SIZE:
        raise ConfigError(f"{name} is {reprlib.repr(value)}; want a whole number of at most {LARGEST_SIZE:,}")
