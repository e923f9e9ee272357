"""Lets the C library keep freed memory while benchmarks run on a CPU, as PyTorch's allocator does on a GPU.

glibc returns what is free at the end of its heap, as soon as that is more than twice the largest block it ever got back
mapped on its own. Whether a training step's activations are returned in its backward, to come back page by page in the
next forward, then depends on what lay where before: with a Llama of hidden size 512 and 1,024 tokens, from 0 to 40,000
page faults a step, up to a tenth of its time, for one provider and not for its rival.

A block of 32 MiB or more glibc maps on its own, fresh page by page each time, unless a free piece of its heap is large
enough: the same dequantisation of 16 million weights took 3 ms or 9 ms, as the heap happened to lie. So none is mapped.
What a provider asked huge pages for stays in huge pages, then, whoever is given it next.

Source: mallopt(3).
"""

import ctypes
import os
import sys

# <malloc.h>
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
LARGEST_KEPT = 2**31 - 1
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_")


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, at the end of its heap up to 2 GiB, and say whether it does.

    Nothing is changed where the environment already says how much, or the C library is another.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or any(name in os.environ for name in VARIABLES):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, LARGEST_KEPT))
