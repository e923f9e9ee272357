"""The most memory a piece of work holds above what was there when it began."""

import gc
import tracemalloc
from collections.abc import Callable
from typing import Any


def peak_bytes_of(build: Callable[[], Callable[[], Any]], device: str = "cpu") -> int:
    """Return what is held after building, and the peak above it while what was built runs.

    Args:
        build: makes the work; what it takes and lets go does not count.
        device: "cpu" or a CUDA device.
    """
    built: list[Callable[[], Any]] = []
    held = _held_bytes(lambda: built.append(build()), device)
    return held + peak_bytes(built[0], device)


def peak_bytes(run: Callable[[], Any], device: str = "cpu") -> int:
    """Return the peak of bytes allocated and not yet freed while run runs, its result included.

    On CUDA that is the caching allocator's count. On CPU it is summed from the allocations and frees that PyTorch's
    profiler records, plus the peak of Python's own allocations, which NumPy's arrays are among: an upper bound, as the
    two peaks may fall at different times. Scratch memory that a C library takes by itself is not seen.

    Args:
        run: the work, without arguments.
        device: "cpu" or a CUDA device.
    """
    import torch

    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    return _traced(run)[0] if torch.device(device).type == "cpu" else _refuse(device)


def _held_bytes(run: Callable[[], Any], device: str) -> int:
    """Return how many bytes more are held after run than before."""
    import torch

    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        run()
        gc.collect()
        torch.cuda.synchronize(device)
        return int(torch.cuda.memory_allocated(device)) - before
    return _traced(run)[1] if torch.device(device).type == "cpu" else _refuse(device)


def _traced(run: Callable[[], Any]) -> tuple[int, int]:
    """Return the peak of bytes, with run's result alive, and what is held in the end without it."""
    from torch.profiler import ProfilerActivity, profile

    tracemalloc.start()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            # the result stays alive until the profile ends, so that it counts
            result = run()
            _, python_peak = tracemalloc.get_traced_memory()
            del result
            gc.collect()
            python_held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = torch_peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        torch_peak = max(torch_peak, held)
    return torch_peak + python_peak - before, held + python_held - before


def _refuse(device: str) -> int:
    raise ValueError(f"memory on {device!r} cannot be measured; want 'cpu' or 'cuda'")
