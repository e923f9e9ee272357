"""Layers whose module works with their weight itself instead of calling them: an adapter there would do nothing.

nn.MultiheadAttention does so with out_proj, and state-space models with the projection of their time steps, and where
their kernels run with others. It is read from the source of the module's methods; where that cannot be read, a layer
counts as called.
"""

import ast
import functools
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn

from lora_core.adapt.fast_path import SWITCHES
from lora_core.adapt.source import source_of
from lora_core.layers.as_written import is_patched
from lora_core.quant import QuantizedWeight

# what is asked of a weight without multiplying by it
ABOUT = frozenset(("device", "dim", "dtype", "is_floating_point", "is_meta", "ndim", "numel", "shape", "size"))
ASKING = frozenset(("getattr", "hasattr", "id", "isinstance", "type"))
# parts of the names of methods that prepare a weight, before it is adapted or quantised
PREPARING = ("init", "reset", "tie")


class Uses(NamedTuple):
    """How a module's methods use its children's weights; of each the children's names.

    Args:
        bypassed: worked with by a method with forward in its name, and called by no method.
        sometimes: the same, but called by another method.
        computed: asked for what tensors alone have, as its data or a product.
    """

    bypassed: frozenset[str]
    sometimes: frozenset[str]
    computed: frozenset[str]


NONE = Uses(frozenset(), frozenset(), frozenset())


def bypassed(model: nn.Module, name: str) -> bool:
    """Say whether the layer of this name is never called, though its weight is used."""
    parent, child = _owner(model, name)
    return isinstance(parent, nn.MultiheadAttention) or child in uses(parent).bypassed


def sometimes_bypassed(model: nn.Module, name: str) -> bool:
    """Say whether a forward of its module, but not every one, works with this layer's weight and does not call it."""
    parent, child = _owner(model, name)
    return child in uses(parent).sometimes


def works_on(model: nn.Module, name: str) -> bool:
    """Say whether its module does with this layer's weight what takes a tensor of numbers."""
    parent, child = _owner(model, name)
    return sometimes_bypassed(model, name) or child in uses(parent).computed


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, child = name.rpartition(".")
    return model.get_submodule(path), child


def uses(parent: nn.Module) -> Uses:
    """Return how a module uses its children's weights; encoders that fast_path.py keeps from it use none."""
    if is_patched(parent) or isinstance(parent, tuple(SWITCHES)):
        return NONE
    kind: Any = type(parent)
    return _uses(kind, tuple(_has(parent, *asked) for asked in _questions(kind)))


@functools.cache
def _uses(kind: Any, answers: tuple[bool, ...]) -> Uses:
    return read_uses(_methods(kind), dict(zip(_questions(kind), answers, strict=True)))


def read_uses(methods: Iterable[ast.FunctionDef], has: dict[tuple[str, str], bool] | None = None) -> Uses:
    """Return how methods use the weights of a module's children.

    Args:
        methods: their definitions.
        has: whether the module has what `hasattr(self.path, name)` asks for, by (path, name): the branch that it
            decides against is not read.
    """
    read: set[str] = set()
    called: set[str] = set()
    alone: set[str] = set()
    computed: set[str] = set()
    for method in methods:
        if not method.args.args:
            continue
        own = method.args.args[0].arg
        nodes = list(_live(method, own, has or {}))
        around = {inner: outer for outer in nodes for inner in ast.iter_child_nodes(outer)}
        read_here, called_here = set(), set()
        for node in nodes:
            if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == own):
                continue
            outer = around[node]
            if not isinstance(node.ctx, ast.Load):
                continue
            if not isinstance(outer, ast.Attribute):
                called_here.add(node.attr)
            elif outer.attr == "weight":
                if "forward" in method.name and _is_operand(outer, around[outer]):
                    read_here.add(node.attr)
                if _takes_numbers(around[outer]) and not any(part in method.name for part in PREPARING):
                    computed.add(node.attr)
        read |= read_here
        called |= called_here
        alone |= read_here - called_here
    return Uses(frozenset(read - called), frozenset(alone & called), frozenset(computed))


def _live(method: ast.AST, own: str, has: dict[tuple[str, str], bool]) -> Iterator[ast.AST]:
    """Yield a method's nodes, without branches that the module never takes."""
    waiting = [method]
    while waiting:
        node = waiting.pop()
        yield node
        asked = _question(node.test, own) if isinstance(node, ast.If) else None
        if isinstance(node, ast.If) and asked in has:
            waiting += node.body if has[asked] else node.orelse
        else:
            waiting += ast.iter_child_nodes(node)


@functools.cache
def _questions(kind: Any) -> tuple[tuple[str, str], ...]:
    """Return what the conditions of a class's methods ask by hasattr, as (path, name)."""
    found: dict[tuple[str, str] | None, None] = {}
    for method in _methods(kind):
        for node in ast.walk(method):
            if isinstance(node, ast.If) and method.args.args:
                found[_question(node.test, method.args.args[0].arg)] = None
    return tuple(asked for asked in found if asked is not None)


def _question(test: ast.expr, own: str) -> tuple[str, str] | None:
    """Return ("config", "name") of hasattr(self.config, "name")."""
    if not (isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id == "hasattr"):
        return None
    owner, *names = test.args
    path = ast.unparse(owner)
    if len(names) != 1 or not isinstance(names[0], ast.Constant) or not path.startswith(f"{own}."):
        return None
    return path.removeprefix(f"{own}."), str(names[0].value)


def _has(module: nn.Module, path: str, name: str) -> bool:
    follow: Callable[[object], object] = operator.attrgetter(path)
    try:
        return hasattr(follow(module), name)
    except AttributeError:
        return False


def _is_operand(node: ast.expr, outer: ast.AST) -> bool:
    """Say whether a weight is worked with where it stands, not asked what it is like or assigned to."""
    if not isinstance(getattr(node, "ctx", None), ast.Load):
        return False
    if isinstance(outer, ast.Attribute):
        return outer.attr not in ABOUT
    if isinstance(outer, ast.Call):
        return not (isinstance(outer.func, ast.Name) and outer.func.id in ASKING)
    return isinstance(outer, (ast.BinOp, ast.keyword, ast.Assign, ast.Return, ast.Subscript))


def _takes_numbers(outer: ast.AST) -> bool:
    """Say whether what stands around a weight asks for what a tensor has and a quantised weight has not."""
    return isinstance(outer, ast.Attribute) and outer.attr not in ABOUT and not hasattr(QuantizedWeight, outer.attr)


@functools.cache
def _methods(kind: Any) -> tuple[ast.FunctionDef, ...]:
    """Return what can be read of a class's own methods and of those it inherits, nn.Module's left out."""
    own = (base for base in kind.__mro__ if base not in nn.Module.__mro__)
    found = (source_of(method) for base in own for method in vars(base).values())
    return tuple(method for method in found if method is not None)
