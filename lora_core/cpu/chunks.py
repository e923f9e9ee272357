"""Work on a long flat array, a chunk that stays in cache at a time, on as many threads as PyTorch uses.

NumPy's and PyTorch's inner loops let go of the interpreter lock, so plain Python threads share the work. Every call
takes the lock for a moment, so the calls have to be long: with chunks of 32,768 elements two threads were slower than
one, with these they take half the time.
"""

import collections
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

# elements; a float32 copy is 1 MiB
CHUNK = 2**18
# PyTorch splits an operation over its own threads above this many elements (at::internal::GRAIN_SIZE), which must not
# happen in ours; its _foreach_ operations take a chunk's grains in one call
GRAIN = 2**15


# ranges a thread gets on average: one that shares its core, as with an OpenMP thread that still waits actively after
# an operation of PyTorch, gets fewer
RANGES = 8


def run(work: Callable[[int, int], None], count: int) -> None:
    """Call work(first, last) on ranges that cover range(count); every first is a multiple of CHUNK.

    Args:
        work: called from several threads at once, on ranges that do not overlap.
        count: elements in all.
    """
    chunks = -(-count // CHUNK)
    threads = min(torch.get_num_threads(), chunks)
    if threads <= 1:
        work(0, count)
        return
    step = max(chunks // (threads * RANGES), 1) * CHUNK
    starts = collections.deque(range(0, count, step))

    def share() -> None:
        while True:
            try:
                first = starts.popleft()
            except IndexError:
                return
            work(first, min(first + step, count))

    # a failure in any share is raised here
    others = [_pool(os.getpid(), threads - 1).submit(share) for _ in range(threads - 1)]
    try:
        share()
    finally:
        for other in others:
            other.result()


# a forked process has the parent's pool without its threads, so it makes its own
@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="lora_core")
