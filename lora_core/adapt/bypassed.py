"""Layers whose module multiplies by their weight itself and never calls them: an adapter there would do nothing.

nn.MultiheadAttention does so with out_proj, and state-space models with the projection of their time steps. It is read
from the source of the module's methods; where that cannot be read, a layer counts as called.
"""

import ast
import functools
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from lora_core.adapt.source import source_of
from lora_core.layers.linear import is_patched

# what is asked of a weight without multiplying by it
ABOUT = frozenset(("device", "dim", "dtype", "is_floating_point", "is_meta", "ndim", "numel", "shape", "size"))
ASKING = frozenset(("getattr", "hasattr", "id", "isinstance", "type"))


def bypassed(model: nn.Module, name: str) -> bool:
    """Say whether the layer of this name is never called, though its weight is used."""
    path, _, child = name.rpartition(".")
    parent = model.get_submodule(path)
    if isinstance(parent, nn.MultiheadAttention):
        return True
    kind: Any = type(parent)
    return not is_patched(parent) and child in _read_past(kind)


@functools.cache
def _read_past(kind: type[nn.Module]) -> frozenset[str]:
    return read_past(_methods(kind))


def read_past(methods: Iterable[ast.FunctionDef]) -> frozenset[str]:
    """Return the children whose weight a method with forward in its name works with, and that no method calls."""
    read: set[str] = set()
    called: set[str] = set()
    for method in methods:
        if not method.args.args:
            continue
        own = method.args.args[0].arg
        around = {inner: outer for outer in ast.walk(method) for inner in ast.iter_child_nodes(outer)}
        for node in ast.walk(method):
            if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == own):
                continue
            outer = around[node]
            if not isinstance(node.ctx, ast.Load):
                continue
            if not isinstance(outer, ast.Attribute):
                called.add(node.attr)
            elif outer.attr == "weight" and "forward" in method.name and _is_operand(outer, around[outer]):
                read.add(node.attr)
    return frozenset(read - called)


def _is_operand(node: ast.expr, outer: ast.AST) -> bool:
    """Say whether a weight is worked with where it stands, not asked what it is like or assigned to."""
    if not isinstance(getattr(node, "ctx", None), ast.Load):
        return False
    if isinstance(outer, ast.Attribute):
        return outer.attr not in ABOUT
    if isinstance(outer, ast.Call):
        return not (isinstance(outer.func, ast.Name) and outer.func.id in ASKING)
    return isinstance(outer, (ast.BinOp, ast.keyword, ast.Assign, ast.Return, ast.Subscript))


def _methods(kind: type[nn.Module]) -> Iterator[ast.FunctionDef]:
    """Yield what can be read of a class's own methods and of those it inherits, nn.Module's left out."""
    for base in kind.__mro__:
        if base in nn.Module.__mro__:
            continue
        for method in vars(base).values():
            found = source_of(method)
            if found is not None:
                yield found
