"""Compiled loops whose ranges threads take without the interpreter."""

import ctypes
import sys
import threading
import time

import numpy as np
import pytest
from numba import types
from numba.extending import intrinsic
from test_cpu_team import three  # noqa: F401

from lora_core.cpu import chunks, team
from lora_core.cpu.compiled.jit import compiled
from lora_core.cpu.compiled.share import share

C = ctypes.CDLL(None)
sleep, this_thread = C.usleep, C.pthread_self
sleep.argtypes, this_thread.argtypes, this_thread.restype = [ctypes.c_uint], [], ctypes.c_size_t
# so long a range takes at least that every thread gets one
MICROSECONDS = 20_000


@compiled
def _mark(seen, threads, first, last):
    sleep(MICROSECONDS)
    for i in range(first, last):
        seen[i] += 1
        threads[i] = this_thread()


@compiled
def mark(openmp, threads, counter, step, count, *arguments):
    share(_mark, openmp, threads, counter, step, count, arguments)


@compiled
def _fail(seen, bad, first, last):
    if first <= bad < last:
        raise ValueError("a range")
    seen[first:last] += 1


@compiled
def fail(openmp, threads, counter, step, count, *arguments):
    share(_fail, openmp, threads, counter, step, count, arguments)


def _has_counter(_, array):
    def generate(context, builder, signature, arguments):
        meminfo = context.make_array(signature.args[0])(context, builder, arguments[0]).meminfo
        return builder.icmp_unsigned("!=", meminfo, meminfo.type(None))

    return types.boolean(array), generate


has_counter = intrinsic(_has_counter)


@compiled
def _add(pair, into, counted, first, last):
    counted[0] += has_counter(pair[0]) + has_counter(into)
    for i in range(first, last):
        into[i] += pair[0][i] * pair[1]


@compiled
def add(openmp, threads, counter, step, count, *arguments):
    share(_add, openmp, threads, counter, step, count, arguments)


def _marked(count, chunk, of_a_thread=None):
    seen, threads = np.zeros(count, np.int64), np.zeros(count, np.uint64)
    chunks.share(mark, count, chunk, of_a_thread or chunk, seen, threads)
    assert (seen == 1).all()
    return threads


@pytest.mark.usefixtures("three")
def test_every_range_is_worked_once_by_several_threads():
    threads = _marked(301, 10)
    assert len(set(threads)) == 3 and this_thread() in threads
    # whole chunks but for the last
    for start in range(0, 301, 10):
        assert len(set(threads[start : start + 10])) == 1


@pytest.mark.usefixtures("three")
@pytest.mark.parametrize("count", [0, 1, 9, 10])
def test_what_is_not_worth_a_second_thread_is_worked_here(count):
    assert set(_marked(count, 10)) <= {this_thread()} == set(_marked(40, 10, of_a_thread=40))


@pytest.mark.usefixtures("three")
def test_forked_process_does_not_wait_for_threads_it_lacks(monkeypatch):
    monkeypatch.setattr(team, "PROCESS", -1)
    assert set(_marked(40, 10)) == {this_thread()}


@pytest.mark.usefixtures("three")
def test_failure_of_a_range_is_raised_and_leaves_the_others():
    seen = np.zeros(100, np.int64)
    with pytest.raises(MemoryError, match="a thread found no memory"):
        chunks.share(fail, 100, 10, 10, seen, 55)
    assert (seen[50:60] == 0).all() and set(seen) == {0, 1} and seen.sum() == 90
    chunks.share(fail, 100, 10, 10, seen, 100)
    assert (seen >= 1).all()


def test_interpreter_is_free_meanwhile():
    """Another thread of Python's goes on while the ranges, 0.2 s or more of them, are worked."""
    fired = []
    threading.Timer(0.001, lambda: fired.append(time.perf_counter())).start()
    seen, threads = np.zeros(20, np.int64), np.zeros(20, np.uint64)
    chunks.share(mark, 20, 1, 1, seen, threads)
    assert fired and fired[0] < time.perf_counter() - MICROSECONDS / 1e6


@pytest.mark.usefixtures("three")
def test_arrays_are_neither_kept_nor_lost():
    """References to them are not counted inside, of those in tuples either."""
    numbers, into, counted = np.arange(100.0), np.zeros(100), np.zeros(1, np.int64)
    before = [sys.getrefcount(a) for a in (numbers, into)]
    for _ in range(5):
        chunks.share(add, 100, 10, 10, (numbers, 2), into, counted)
    assert [sys.getrefcount(a) for a in (numbers, into)] == before
    assert (into == 10 * np.arange(100.0)).all() and counted == 0
