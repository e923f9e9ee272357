"""The source of functions, read to see what a module's methods do."""

import ast
import inspect
import textwrap
from typing import Any


def source_of(function: Any) -> ast.FunctionDef | None:
    """Return a function's definition without what wraps it, as a decorator does; None where it cannot be read."""
    try:
        found = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]
    except (OSError, TypeError, SyntaxError, ValueError, IndexError):
        return None
    return found if isinstance(found, ast.FunctionDef) else None
