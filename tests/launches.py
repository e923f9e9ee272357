"""How Triton would compile the launches that the interpreter runs, and whether `variants()` lists that.

Triton compiles a kernel anew for every set of types, of arguments that are 1 and of those that are multiples of 16. The
rules are its own: what a launcher asks is asked here, of the arguments of a launch and of a listed configuration.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

from benchmarks.codegen import kernel_names, variants_of

# constants that have another value in the interpreter, and their value on a GPU: levels are shuffled
ON_A_GPU = {"SHUFFLED": True}


class Configuration(NamedTuple):
    """What decides how a launch is compiled: types, constants, multiples of 16, and options."""

    kernel: str
    arguments: tuple[tuple[str, Any, bool], ...]
    options: tuple[tuple[str, Any], ...]


@functools.cache
def _launcher(function: Any, rest: tuple[tuple[str, Any], ...]) -> Any:
    kernel = JITFunction(function, **dict(rest))
    backend = CUDABackend(GPUTarget("cuda", 90, 32))
    return create_function_from_signature(kernel.signature, kernel.params, backend)


def compiled_as(kernel: InterpretedFunction, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Configuration:
    """Say how Triton would compile a launch with these arguments."""
    frozen = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in kernel.kwargs.items())
    bound, kinds, options = _launcher(kernel.fn, frozen)(*arguments, **keywords)
    found = []
    for (name, value), (kind, more) in zip(bound.items(), kinds, strict=True):
        if kind == "constexpr":
            found.append((name, ON_A_GPU.get(name, value), False))
        else:
            found.append((name, kind, "D" in (more or "")))
    return Configuration(kernel.fn.__name__, tuple(found), _options(options))


def listed_as(variant: Any) -> Configuration:
    """Say the same of a listed configuration."""
    found = []
    for name in variant.kernel.arg_names:
        if name in variant.constant:
            found.append((name, variant.constant[name], False))
        else:
            found.append((name, variant.signature[name], name in variant.aligned))
    return Configuration(variant.kernel.fn.__name__, tuple(found), _options(variant.options))


def _options(options: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(options.items()))


@functools.cache
def listed() -> frozenset[Configuration]:
    """Every configuration that the kernels' files list."""
    return frozenset(listed_as(v) for name in kernel_names() for v in variants_of(name))


@contextmanager
def recorded(run: bool = True) -> Iterator[set[Configuration]]:
    """How the launches made meanwhile would be compiled.

    Args:
        run: whether they run, too.
    """
    found: set[Configuration] = set()
    interpret = InterpretedFunction.run

    def recording(self: Any, *arguments: Any, grid: Any, warmup: Any, **keywords: Any) -> Any:
        found.add(compiled_as(self, arguments, keywords))
        return interpret(self, *arguments, grid=grid, warmup=warmup or not run, **keywords)

    InterpretedFunction.run = recording
    try:
        yield found
    finally:
        InterpretedFunction.run = interpret
