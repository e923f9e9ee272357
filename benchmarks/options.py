"""What the commands of the benchmarks take as options: each is refused with a reason before anything is measured."""

import argparse
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from benchmarks import shapes


def count(text: str) -> int:
    """Return a whole number of at least 1."""
    return _whole(text, 1)


def seed(text: str) -> int:
    """Return a whole number of at least 0."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r}; want a whole number of at least {least}")
    return int(text)


def shape(text: str) -> dict[str, int]:
    """Return shapes.parse(text), whose reason argparse prints only as an error of its own."""
    given = Counter(part.partition("=")[0].strip() for part in text.split(","))
    twice = [name for name, times in given.items() if times > 1]
    if "=" in text and twice:
        raise argparse.ArgumentTypeError(f"shape {text!r} gives {', '.join(twice)} twice; want each size once")
    try:
        return shapes.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def folder(text: str) -> Path:
    """Return the path of a folder that is there and can be written in, or can be made."""
    path = Path(text)
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: {there} is a file; want a folder")
    if not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r}: {there} cannot be written in; want a folder of yours")
    return path


def lacking(given: dict[str, int], wanted: Iterable[str]) -> str:
    """Return the sizes that a shape lacks, as "M, R"; nothing where it has all."""
    return ", ".join(name for name in wanted if name not in given)
