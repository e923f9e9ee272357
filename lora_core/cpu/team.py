"""PyTorch's own threads, asked to run a Python function or a compiled loop.

After an operation OpenMP's threads wait for the next one actively, for milliseconds, each on a core of its own. Threads
of ours would share those cores with them: a loop of 7 ms took 10 ms next to a matrix product. So the loops run on the
same threads. A ctypes callback takes the interpreter lock, and compiled loops and NumPy let go of it.
"""

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

# the name under which PyTorch's wheels load GNU's OpenMP on Linux, and conda's LLVM's in its place
OPENMP = "libgomp.so.1"
PROCESS = os.getpid()
REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def share(loop: Callable[..., None], threads: int, *arguments: Any) -> None:
    """Run a loop of lora_core.cpu.compiled on so many threads, without the interpreter where they are OpenMP's.

    Args:
        loop: called (openmp, threads, counter, *arguments).
        threads: 1 at least.
        arguments: of the loop.
    """
    # where the next range begins, for all threads
    counter = np.zeros(1, np.intp)
    if threads == 1 or os.getpid() != PROCESS:
        loop(0, 1, counter, *arguments)
    elif openmp := _address():
        loop(openmp, threads, counter, *arguments)
    else:
        together(functools.partial(loop, 0, 1, counter, *arguments), threads)


def together(share: Callable[[], None], threads: int) -> None:
    """Call share() once on each of so many threads, the caller's among them; raise what one of them raised."""
    if os.getpid() != PROCESS:
        # a forked process has neither's threads, and waits for OpenMP's without end
        share()
        return
    openmp = _openmp()
    if openmp is None:
        others = [_pool(threads - 1).submit(share) for _ in range(threads - 1)]
        try:
            share()
        finally:
            for other in others:
                other.result()
        return
    failures = []

    def region(_: Any) -> None:
        try:
            share()
        except BaseException as failure:  # a callback cannot raise
            failures.append(failure)

    openmp.GOMP_parallel(REGION(region), None, threads, 0)
    if failures:
        raise failures[0]


@functools.cache
def _address() -> int:
    """Return where GOMP_parallel is, or 0."""
    openmp = _openmp()
    return 0 if openmp is None else ctypes.cast(openmp.GOMP_parallel, ctypes.c_void_p).value or 0


@functools.cache
def _openmp() -> Any:
    """Return the OpenMP that PyTorch has loaded, or None where it is another than GNU's."""
    try:
        library = ctypes.CDLL(OPENMP, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        library.GOMP_parallel.argtypes = [REGION, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        library.GOMP_parallel.restype = None
    except (OSError, AttributeError):
        return None
    return library


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="lora_core")
