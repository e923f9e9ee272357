"""Work on a long flat array, a chunk that stays in cache at a time, on as many threads as PyTorch uses.

NumPy's, PyTorch's and compiled loops let go of the interpreter lock, so threads share the work. Every call takes the
lock for a moment, so the calls have to be long: with chunks of 32,768 elements two threads were slower than one, with
these they take half the time. A loop that is compiled with the taking of its ranges needs the lock for none of them.
"""

import collections
from collections.abc import Callable
from typing import Any

import torch

from lora_core.cpu import team

# elements; a float32 copy is 1 MiB
CHUNK = 2**18
# PyTorch splits an operation over its own threads above this many elements (at::internal::GRAIN_SIZE), which must not
# happen in ours; its _foreach_ operations take a chunk's grains in one call
GRAIN = 2**15
# elements worth a range of a compiled loop: some 6 us
SHARED = 2**15
# ranges a thread gets on average: one that shares its core with another program gets fewer
RANGES = 8


def share(loop: Callable[..., None], count: int, chunk: int, of_a_thread: int, *arguments: Any) -> None:
    """Run a compiled loop on ranges that cover range(count); every one but the last is a multiple of chunk long.

    Args:
        loop: of lora_core.cpu.compiled, called (openmp, threads, counter, step, count, *arguments).
        count: elements, or whatever is shared out, in all.
        chunk: how many of them are worth a range.
        of_a_thread: how many of them are worth a thread: all wait for the last, which another program may hold up.
        arguments: of the loop.
    """
    threads, step = _shares(count, chunk, of_a_thread)
    team.share(loop, threads, step, count, *arguments)


def run(work: Callable[[int, int], None], count: int, chunk: int = CHUNK) -> None:
    """Call work(first, last) on ranges that cover range(count); every first is a multiple of chunk.

    Args:
        work: called from several threads at once, on ranges that do not overlap.
        count: elements, or whatever is shared out, in all.
        chunk: how many of them are worth a call.
    """
    threads, step = _shares(count, chunk, chunk)
    if threads == 1:
        work(0, count)
        return
    starts = collections.deque(range(0, count, step))

    # inference mode is a thread's own, and its tensors may be written in no other mode
    inference = torch.is_inference_mode_enabled()

    def share() -> None:
        with torch.inference_mode(inference):
            while True:
                try:
                    first = starts.popleft()
                except IndexError:
                    return
                work(first, min(first + step, count))

    team.together(share, threads)


def _shares(count: int, chunk: int, of_a_thread: int) -> tuple[int, int]:
    """Return the threads that a count is worth, and what they take of it at a time."""
    threads = min(torch.get_num_threads(), max(-(-count // of_a_thread), 1))
    return threads, max(-(-count // chunk) // (threads * RANGES), 1) * chunk
