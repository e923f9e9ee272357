"""The regular expressions that PEFT makes of a configuration's patterns and names."""

import functools
import re

from lora_core.errors import ConfigError


def name_ending(pattern: str) -> str:
    """Return the expression for names that end as a key of rank_pattern or alpha_pattern says."""
    return rf"(.*\.)?({pattern})$"


# re keeps the last 512 expressions alone: fewer than a large model's modules, each of which may have its pattern
@functools.lru_cache(maxsize=2**14)
def compiled_ending(pattern: str) -> re.Pattern[str]:
    """Return name_ending, compiled."""
    return re.compile(name_ending(pattern))


def layer_number(pattern: str) -> str:
    """Return the expression whose last group is the number behind a list of layers, as layers_pattern calls it."""
    return rf"(?:^|.*?\.){pattern}\.(\d+)\."


def inside_of(name: str) -> str:
    """Return the expression for an entry of modules_to_save and all modules inside."""
    return rf"(^|.*\.){name}($|\..*)"


def check_expression(expression: str, whole: str | None = None) -> None:
    """Raise ConfigError unless this compiles as a regular expression, and as the part of a whole one."""
    error = _fault(expression)
    if error:
        raise ConfigError(f"LoraConfig: {expression!r} is no regular expression: {error}")
    error = _fault(whole) if whole is not None else ""
    if error:
        raise ConfigError(
            f"LoraConfig: {expression!r} is no part of a regular expression, as {whole!r} shows: {error}; want one "
            "that may stand inside another: flags as in (?i:...)"
        )


def _fault(expression: str) -> str:
    try:
        re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error)
    return ""
