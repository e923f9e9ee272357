"""What was found out about a class or a function, as long as there is one."""

import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def remembered(find: Callable[..., T]) -> Callable[..., T]:
    """Return find with its results kept by arguments, of which the first, a class or a function, is held weakly.

    A class made in a function goes with all that its methods hold. Results must not refer to it.
    """
    found: weakref.WeakKeyDictionary[Any, dict[Any, T]] = weakref.WeakKeyDictionary()

    @functools.wraps(find)
    def look(about: Any, *rest: Any) -> T:
        known = found.setdefault(about, {})
        if rest not in known:
            known[rest] = find(about, *rest)
        return known[rest]

    return look
