"""Freed memory is kept between samples: what is allocated anew causes no page faults."""

import os
import platform
import subprocess
import sys

import pytest

from benchmarks import heap

# tensors of 3 MiB and one of 60, written, all freed, and the same again; each is to be mapped on its own first of all,
# as whether the end of the heap is given back depends on what else lies there
PROGRAM = """
import ctypes, resource, torch
from benchmarks import heap
ctypes.CDLL(None).mallopt(-3, 131072)  # M_MMAP_THRESHOLD
kept = {keep} and heap.keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(mib * 2**18) for mib in (60, *20 * [3])]
    del tensors
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(kept, faults)
"""
on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone is told what to keep")
PAGES = 120 * 2**20 // 4096


def run(keep, **variables):
    env = {k: v for k, v in os.environ.items() if k not in heap.VARIABLES} | variables
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(keep=keep)], env=env, capture_output=True, text=True, check=True
    )
    kept, faults = done.stdout.split()
    return kept, int(faults)


@on_glibc
def test_benchmark_processes_fault_no_page_in_twice():
    kept, faults = run(True)
    assert kept == "True" and faults < PAGES // 10
    # else there would be nothing to keep it from
    assert run(False)[1] > PAGES // 2


@on_glibc
@pytest.mark.parametrize("name", heap.VARIABLES)
def test_what_the_environment_says_of_freed_memory_is_left_alone(name):
    kept, faults = run(True, **{name: "131072"})
    assert kept == "False" and faults > PAGES // 2


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    assert heap.keep_freed_memory() is False
