"""The most memory a piece of work holds above what was there when it began."""

import gc
import tracemalloc
from collections.abc import Callable
from typing import Any


def peak_bytes_of(build: Callable[[], Callable[[], Any]], device: str = "cpu") -> int:
    """Return what building leaves held, and the peak above it while what was built runs.

    Args:
        build: makes the work; what it takes and lets go does not count.
        device: "cpu" or a CUDA device.
    """
    run, held = _held(build, device)
    return held + peak_bytes(run, device)


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
    return _traced_peak(run) if torch.device(device).type == "cpu" else _refuse(device)


def _held(build: Callable[[], Any], device: str) -> tuple[Any, int]:
    """Return what is built, and the bytes of tensors that were not there before, on a CPU with Python's objects."""
    import torch

    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        _refuse(device)
    before = _storages(kind)
    tracemalloc.start()
    try:
        built = build()
        after = _storages(kind)
        objects, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    tensors = sum(size for place, size in after.items() if place not in before)
    return built, tensors + (objects if kind == "cpu" else 0)


def _storages(kind: str) -> dict[int, int]:
    """Return where the memory of every tensor on this type of device begins, and its bytes."""
    import torch

    gc.collect()
    found = {}
    for t in gc.get_objects():
        # those that handle operations themselves may have no memory of their own
        plain = issubclass(type(t), torch.Tensor) and type(t).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
        if plain and t.device.type == kind and t.layout == torch.strided:
            storage = t.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def _traced_peak(run: Callable[[], Any]) -> int:
    from torch.profiler import ProfilerActivity, profile

    tracemalloc.start()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            # the result stays alive until the profile ends, so that it counts
            result = run()
            _, python_peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    del result
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = torch_peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        torch_peak = max(torch_peak, held)
    return torch_peak + python_peak - before


def _refuse(device: str) -> int:
    raise ValueError(f"memory on {device!r} cannot be measured; want 'cpu' or 'cuda'")
