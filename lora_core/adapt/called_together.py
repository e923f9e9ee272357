"""Which children a module's forward calls with one and the same tensor, read from its source."""

import ast
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from lora_core.adapt.remembered import remembered
from lora_core.adapt.source import source_of
from lora_core.layers.as_written import is_patched, written_class


def called_together(parent: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Return the groups of children that parent's forward calls with one local variable, in calling order.

    Counted are calls self.child(x) in one block of statements, x a plain name that is not assigned in between. Where
    the source cannot be read or a forward is patched onto the module itself, there are none.
    """
    return () if is_patched(parent) else _groups(written_class(parent).forward)


@remembered
def _groups(forward: Callable[..., Any]) -> tuple[tuple[str, ...], ...]:
    function = source_of(forward)
    if function is None or not function.args.args:
        return ()
    reader = _Reader(function.args.args[0].arg)
    for statement in function.body:
        reader.visit(statement)
    return tuple(group for group in reader.finished() if len(group) > 1)


class _Reader(ast.NodeVisitor):
    """Walks a forward in the order in which it runs."""

    def __init__(self, module: str) -> None:
        self.module = module
        # the block that is being read, as the branches that lead to it
        self.block: tuple[tuple[int, str], ...] = ()
        self.open: dict[tuple[str, tuple[tuple[int, str], ...]], list[str]] = {}
        self.closed: list[list[str]] = []

    def finished(self) -> Iterator[tuple[str, ...]]:
        """Yield every group that was found."""
        yield from map(tuple, (*self.closed, *self.open.values()))

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        child, arguments = node.func, node.args
        if (
            isinstance(child, ast.Attribute)
            and isinstance(child.value, ast.Name)
            and child.value.id == self.module
            and len(arguments) == 1
            and not node.keywords
            and isinstance(arguments[0], ast.Name)
        ):
            group = self.open.setdefault((arguments[0].id, self.block), [])
            if child.attr in group:
                # called twice with one tensor: a second round
                self.closed.append(group[:])
                group.clear()
            group.append(child.attr)

    def visit_Name(self, node: ast.Name) -> None:
        if not isinstance(node.ctx, ast.Load):
            for key in [key for key in self.open if key[0] == node.id]:
                self.closed.append(self.open.pop(key))

    def visit_Assign(self, node: ast.Assign) -> None:
        # the value is computed before the names are bound
        self.visit(node.value)
        for target in node.targets:
            self.visit(target)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.visit(node.value)
        self.visit(node.target)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)
        self.visit(node.target)

    def visit_If(self, node: ast.stmt) -> None:
        for name, field in ast.iter_fields(node):
            nodes = [n for n in (field if isinstance(field, list) else [field]) if isinstance(n, ast.AST)]
            outer = self.block
            if isinstance(field, list):
                self.block = (*outer, (id(node), name))
            for inner in nodes:
                self.visit(inner)
            self.block = outer

    # in a with, other modes may hold
    visit_For = visit_While = visit_With = visit_If

    def _skip(self, node: ast.AST) -> None:
        """Leave out calls that need not run where they stand, but not what is assigned there."""
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name):
                self.visit_Name(inner)

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = visit_ClassDef = _skip
    visit_Try = visit_IfExp = visit_BoolOp = visit_Match = _skip
    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _skip
