"""Two domains of real text that every Python carries: English prose about Python, and Python source code.

Prose: the language reference in `pydoc_data.topics` and the docstrings of the standard library. Code: the standard
library's source with its docstrings taken out, so that no text belongs to both domains. The source is parsed, never
imported. Which documents are held out is decided by the hash of their content: it depends neither on the order of the
files nor on the seed, and a document that is the same in two Python versions is on the same side in both.
"""

import ast
import hashlib
import inspect
import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_core.errors import ConfigError

# tests are optional in distributions; the rest is generated tables, other people's packages, or the topics themselves
LEFT_OUT_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings"}
LEFT_OUT_FOLDERS |= {"pydoc_data", "ensurepip", "__pycache__", "__phello__"}
# longer files are tables or generated
LONGEST_SOURCE_BYTES = 200_000
# shorter docstrings are mostly repeated phrases
SHORTEST_DOCSTRING_BYTES = 60
# source files are taken in the order of their digests until so many
CODE_LIMIT_BYTES = 3_000_000
# one document in HELD_OUT_ONE_IN is never trained on
HELD_OUT_ONE_IN = 16
SMALLEST_DOMAIN_BYTES = 100_000

Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
# what has statements, among which definitions are
Holder = ast.stmt | ast.excepthandler | ast.match_case


@dataclass(frozen=True)
class Domain:
    """Documents of one kind, in the order of their digests."""

    name: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    sha256: str


@dataclass(frozen=True)
class Corpus:
    """The prose that the base is pre-trained on and the code that it is adapted to."""

    prose: Domain
    code: Domain


def load_corpus() -> Corpus:
    """Reads both domains from the running Python's standard library.

    Returns:
        The corpus; equal for equal Python versions.
    Raises:
        ConfigError: if this Python carries too little of its standard library's source.
    Source: pydoc_data.topics and the standard library, both under the PSF licence.
    """
    prose, code = list(_topics()), []
    for path in _source_files():
        try:
            source = path.read_text("utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        documented = [
            (node, text) for node in _definitions(tree) if (text := ast.get_docstring(node, clean=False)) is not None
        ]
        prose.extend(_docstrings(text for _, text in documented))
        code.append(_without_docstrings(source, [node for node, _ in documented]))
    return Corpus(_domain("prose", prose), _domain("code", code, CODE_LIMIT_BYTES))


def digest(text: str) -> str:
    """Hexadecimal SHA-256 of the text's words, so that re-indented copies count as one document."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()


def _domain(name: str, documents: Iterable[str], limit_bytes: int | None = None) -> Domain:
    """The distinct documents in the order of their digests, split by digest."""
    by_digest: dict[str, str] = {}
    for document in documents:
        if document.strip():
            by_digest.setdefault(digest(document), document)
    train: list[str] = []
    held_out: list[str] = []
    total, whole = 0, hashlib.sha256()
    for key in sorted(by_digest):
        if limit_bytes is not None and total >= limit_bytes:
            break
        # sorted by the leading digits, so the side is read from the trailing ones
        (held_out if int(key[-8:], 16) % HELD_OUT_ONE_IN == 0 else train).append(by_digest[key])
        total += len(by_digest[key].encode())
        whole.update(by_digest[key].encode() + b"\0")
    if total < SMALLEST_DOMAIN_BYTES:
        raise ConfigError(
            f"this Python's standard library gave {total:,} bytes of {name}, the demo needs {SMALLEST_DOMAIN_BYTES:,}; "
            "run it with a Python that was installed with its library's .py files (not zipped or stripped)"
        )
    return Domain(name, tuple(train), tuple(held_out), whole.hexdigest())


def _topics() -> Iterator[str]:
    """The pages of the language reference that `help()` shows."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    yield from topics.values()


def _source_files() -> Iterator[Path]:
    """The standard library's modules."""
    found = []
    for folder, folders, files in os.walk(sysconfig.get_path("stdlib")):
        # in place: what is left out is not walked
        folders[:] = [name for name in folders if name not in LEFT_OUT_FOLDERS]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    for path in sorted(found):
        if path.stat().st_size <= LONGEST_SOURCE_BYTES:
            yield path


def _definitions(tree: ast.Module) -> Iterator[Definition]:
    """Everything in a module that may carry a docstring, level by level; expressions hold none and are passed by."""
    level: list[ast.AST] = [tree]
    while level:
        yield from (node for node in level if isinstance(node, Definition))
        held = (getattr(node, field, None) for node in level for field in node._fields)
        level = [part for parts in held if isinstance(parts, list) for part in parts if isinstance(part, Holder)]


def _docstrings(texts: Iterable[str]) -> Iterator[str]:
    """Docstrings, their indentation taken off, that are long enough to be prose."""
    for text in texts:
        clean = inspect.cleandoc(text).encode(errors="replace")
        if len(clean) >= SHORTEST_DOCSTRING_BYTES:
            yield clean.decode() + "\n"


def _without_docstrings(source: str, documented: Iterable[Definition]) -> str:
    """The source less the lines that hold nothing but a docstring."""
    lines = source.splitlines(keepends=True)
    for node in documented:
        text = node.body[0]
        if lines[text.lineno - 1][: text.col_offset].strip() or text.end_lineno is None:
            continue
        lines[text.lineno - 1 : text.end_lineno] = [""] * (text.end_lineno - text.lineno + 1)
    return "".join(lines)
