"""Layers whose module works with their weight itself instead of calling them: an adapter there would do nothing.

nn.MultiheadAttention does so with out_proj, and state-space models with the projection of their time steps and, in
training, where their kernels run, with others. It is read from the source of the module's methods; where that cannot be
read, a layer counts as called.
"""

import ast
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn

from lora_core.adapt.fast_path import SWITCHES
from lora_core.adapt.remembered import remembered
from lora_core.adapt.source import source_of
from lora_core.layers.as_written import is_patched
from lora_core.quant import QuantizedWeight

# what is asked of a weight without multiplying by it
ABOUT = frozenset(("device", "dim", "dtype", "grad", "is_floating_point", "is_meta", "ndim", "numel", "shape", "size"))
ASKING = frozenset(("getattr", "hasattr", "id", "isinstance", "type"))
# parts of the names of methods that prepare a weight, before it is adapted or quantised
PREPARING = ("init", "reset", "tie")


class Uses(NamedTuple):
    """How a module's methods use its children's weights; of each the children's names.

    Args:
        bypassed: worked with by a method with forward in its name, and called by no method.
        in_training: called, but worked with by such a method where it asks whether the module trains.
        computed: asked for what tensors alone have, as its data or a product.
    """

    bypassed: frozenset[str]
    in_training: frozenset[str]
    computed: frozenset[str]


NONE = Uses(frozenset(), frozenset(), frozenset())


def bypassed(model: nn.Module, name: str) -> bool:
    """Say whether the layer of this name is never called, though its weight is used."""
    parent, child = _owner(model, name)
    return isinstance(parent, nn.MultiheadAttention) or child in uses(parent).bypassed


def bypassed_in_training(model: nn.Module, name: str) -> bool:
    """Say whether its module, when it trains, may work with this layer's weight and not call it."""
    parent, child = _owner(model, name)
    return child in uses(parent).in_training


def works_on(model: nn.Module, name: str) -> bool:
    """Say whether its module does with this layer's weight what takes a tensor of numbers."""
    parent, child = _owner(model, name)
    return child in uses(parent).in_training | uses(parent).computed


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, child = name.rpartition(".")
    return model.get_submodule(path), child


def uses(parent: nn.Module) -> Uses:
    """Return how a module uses its children's weights; encoders that fast_path.py keeps from it use none."""
    if is_patched(parent) or isinstance(parent, tuple(SWITCHES)):
        return NONE
    kind: Any = type(parent)
    return _uses(kind, tuple(_has(parent, *asked) for asked in _questions(kind)))


@remembered
def _uses(kind: Any, answers: tuple[bool | None, ...]) -> Uses:
    """Return how a class's methods use the weights of a module's children.

    Args:
        kind: the class.
        answers: to its _questions; the branch that one decides against is not read. None where it is not known.
    """
    methods, has = _methods(kind), dict(zip(_questions(kind), answers, strict=True))
    preparing = _preparing(methods)
    read: set[str] = set()
    called: set[str] = set()
    trained: set[str] = set()
    computed: set[str] = set()
    for method in methods:
        if not method.args.args:
            continue
        own = method.args.args[0].arg
        nodes = dict(_live(method, own, has))
        around = {inner: outer for outer in nodes for inner in ast.iter_child_nodes(outer)}
        for node, training in nodes.items():
            child = _own_attribute(node, own)
            if child is None:
                continue
            outer = around[node]
            if not isinstance(outer, ast.Attribute):
                called.add(child)
            elif outer.attr == "weight":
                if "forward" in method.name and _is_operand(outer, around[outer]):
                    (trained if training else read).add(child)
                if method.name not in preparing and _takes_numbers(around[outer]):
                    computed.add(child)
    read |= trained
    return Uses(frozenset(read - called), frozenset(trained & called), frozenset(computed))


def _own_attribute(node: ast.AST, own: str) -> str | None:
    """Return the name in self.name where it is read."""
    is_own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == own
    return node.attr if isinstance(node, ast.Attribute) and is_own and isinstance(node.ctx, ast.Load) else None


def _preparing(methods: Iterable[ast.FunctionDef]) -> set[str]:
    """Return the names of the methods that only prepare weights: named so, or called by such, and not by a forward."""
    calls = {
        method.name: {_own_attribute(node, method.args.args[0].arg) for node in ast.walk(method)}
        for method in methods
        if method.args.args
    }

    def reached(waiting: list[str]) -> set[str]:
        found: set[str] = set()
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting += [called for called in calls[name] if called in calls]
        return found

    named = [name for name in calls if any(part in name for part in PREPARING)]
    return reached(named) - reached([name for name in calls if "forward" in name])


def _live(method: ast.AST, own: str, has: dict[tuple[str, str], bool | None]) -> Iterator[tuple[ast.AST, bool]]:
    """Yield a method's nodes, without branches that the module never takes, and whether the module trains there."""
    waiting = [(method, False)]
    while waiting:
        node, training = waiting.pop()
        yield node, training
        if not isinstance(node, ast.If):
            waiting += [(inner, training) for inner in ast.iter_child_nodes(node)]
            continue
        waiting.append((node.test, training))
        asked = _question(node.test, own)
        answer = None if asked is None else has[asked]
        asks = any(_own_attribute(inner, own) == "training" for inner in ast.walk(node.test))
        if answer is not False:
            waiting += [(inner, training or asks) for inner in node.body]
        if answer is not True:
            waiting += [(inner, training) for inner in node.orelse]


@remembered
def _questions(kind: Any) -> tuple[tuple[str, str], ...]:
    """Return what the conditions of a class's methods ask by hasattr, as (attribute, name)."""
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
    attribute, name = (_own_attribute(test.args[0], own), test.args[1]) if len(test.args) == 2 else (None, None)
    if attribute is None or not (isinstance(name, ast.Constant) and isinstance(name.value, str)):
        return None
    return attribute, name.value


def _has(module: nn.Module, attribute: str, name: str) -> bool | None:
    """Say whether an attribute has one of this name; None for a child, which may be replaced, and a property."""
    if attribute not in vars(module):
        return None
    try:
        return hasattr(vars(module)[attribute], name)
    except Exception:
        return None


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


@remembered
def _methods(kind: Any) -> tuple[ast.FunctionDef, ...]:
    """Return what can be read of a class's own methods and of those it inherits, nn.Module's left out."""
    own = (base for base in kind.__mro__ if base not in nn.Module.__mro__)
    found = (source_of(method) for base in own for method in vars(base).values())
    return tuple(method for method in found if method is not None)
