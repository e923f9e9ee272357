"""Which names of its module a forward loads, and what it reads of them."""

import dis
import itertools
import types
from collections.abc import Iterator
from typing import Any


def loads(forward: Any, name: str) -> Iterator[str | None]:
    """Yield what is read of a name of its module, each time a forward loads it: an attribute, or None if it is none.

    Nothing where the forward is no function, or sets names of its module itself.
    """
    code = getattr(forward, "__code__", None)
    if code is None or any(i.opname in ("STORE_GLOBAL", "DELETE_GLOBAL") for i in _instructions(code)):
        return
    for this, following in itertools.pairwise(_instructions(code)):
        if this.opname == "LOAD_GLOBAL" and this.argval == name:
            yield following.argval if following.opname in ("LOAD_ATTR", "LOAD_METHOD") else None


def _instructions(code: types.CodeType) -> Iterator[dis.Instruction]:
    """Yield what a code does, and what functions and comprehensions in it do."""
    yield from dis.get_instructions(code)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _instructions(inner)
