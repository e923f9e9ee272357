"""The source of functions, read to see what a module's methods do."""

import ast
import inspect
import textwrap
from typing import Any


def returns_several(forward: Any) -> bool:
    """Say whether a forward returns a tuple, as written."""
    found = source_of(forward)
    returned = [n.value for n in ast.walk(found) if isinstance(n, ast.Return)] if found else []
    return any(isinstance(value, ast.Tuple) for value in returned)


def source_of(function: Any) -> ast.FunctionDef | None:
    """Return a function's definition without what wraps it, as a decorator does; None where it cannot be read."""
    try:
        found = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]
    except (OSError, TypeError, SyntaxError, ValueError, IndexError):
        return None
    return found if isinstance(found, ast.FunctionDef) else None
