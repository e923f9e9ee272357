"""Time several providers of the same work: interleaved samples in one process, the cache flushed between them.

Only ratios within one run mean anything: the machine's speed changes from minute to minute, and interleaving lets
every provider see the same changes. Our provider runs in two slots; how far its two medians lie apart, and how wide the
samples scatter, is the spread inside which a ratio says nothing.
"""

import functools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.case import Provider

AGAIN = " (again)"

# a normal distribution's 20th and 80th percentiles lie 1.683 standard deviations apart
P20_TO_P80_SIGMAS = 1.683
# standard error of a median of n normal samples, in sigma / sqrt(n): sqrt(pi / 2)
MEDIAN_ERROR = 1.2533
# a ratio whose spread is above this says nothing at all: either may be twice as fast
WIDEST_SPREAD = 1.0
# of differences that scatter alone makes, so many are inside the spread
CONFIDENCE = 0.95

# more than the last-level cache of any GPU, and of a processor that does not say how large its own is
FLUSH_BYTES = 256 * 2**20
# where Linux says how large the caches of a core are
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


class ProviderError(Exception):
    """A provider raised while it was timed; the cause is what it raised."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


@dataclass(frozen=True)
class Timing:
    """What the samples of one slot come to.

    Args:
        samples_ms: every sample, in the order taken.
        warmup_ms: time spent before the first sample.
    """

    samples_ms: tuple[float, ...]
    warmup_ms: float

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)

    @property
    def p20_ms(self) -> float:
        return quantile(self.samples_ms, 0.2)

    @property
    def p80_ms(self) -> float:
        return quantile(self.samples_ms, 0.8)


def quantile(values: tuple[float, ...], share: float) -> float:
    """Return the value below which a share of them lies, interpolated between neighbours."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def median_error(median_ms: float, p20_ms: float, p80_ms: float, samples: int) -> float:
    """Return the relative standard error of a median, from what a row holds."""
    sigma = (p80_ms - p20_ms) / P20_TO_P80_SIGMAS
    return MEDIAN_ERROR * sigma / samples**0.5 / median_ms if median_ms else 0.0


def spread(ours: Any, rival: Any, again: Any | None = None) -> float:
    """Return the relative difference of two medians below which they count as equal; infinite for a single sample.

    The larger of the 95% interval of their ratio, from each one's scatter, which few samples know the less (Student's
    t), and our provider's difference from itself.

    Args:
        ours: a Timing or Record, as the others are.
        rival: what it is compared with.
        again: the second slot of `ours`.
    """
    counts = [t.samples if isinstance(getattr(t, "samples", None), int) else len(t.samples_ms) for t in (ours, rival)]
    if min(counts) < 2:
        return math.inf
    errors = [median_error(t.median_ms, t.p20_ms, t.p80_ms, n) for t, n in zip((ours, rival), counts, strict=True)]
    scatter = _sigmas(min(counts)) * sum(e * e for e in errors) ** 0.5
    if again is None or not ours.median_ms or not again.median_ms:
        return scatter
    from_itself = again.median_ms / ours.median_ms
    return max(scatter, max(from_itself, 1 / from_itself) - 1)


@functools.cache
def _sigmas(samples: int) -> float:
    """Return how many standard errors of so many samples CONFIDENCE takes."""
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, samples - 1))


def verdict(ours_ms: float, rival_ms: float, within: float) -> str:
    """Say "faster", "slower" or "tie": a ratio inside the spread is a tie.

    Args:
        ours_ms: our median.
        rival_ms: the rival's median.
        within: the spread.
    """
    ratio = rival_ms / ours_ms
    if 1 / (1 + within) <= ratio <= 1 + within:
        return "tie"
    return "faster" if ratio > 1 else "slower"


def enough_to_flush(device: str) -> int:
    """Return how many bytes written push everything else out of the device's caches: on a CPU, twice the last one."""
    named = CACHES.glob("index*/size") if device == "cpu" else ()
    kib = [int(path.read_text().strip().removesuffix("K")) for path in named]
    return 2 * 1024 * max(kib) if kib else FLUSH_BYTES


def interleave(
    providers: list[Provider],
    samples: int,
    device: str = "cpu",
    seed: int = 0,
    warmup: int = 2,
    flush_bytes: int | None = None,
    repeat: str | None = None,
) -> Iterator[dict[str, Timing]]:
    """Take samples of every provider in turn, in an order shuffled anew each round; yield after each round.

    The result so far is yielded, so that the caller can show progress; the last one is complete. Python's garbage
    collector runs as it does in use.

    Args:
        providers: what to time.
        samples: rounds.
        device: "cpu" or a CUDA device, which is timed by its own events.
        seed: of the shuffling.
        warmup: runs of each before the first sample.
        flush_bytes: size of the buffer written between samples; 0 leaves the cache warm. By default what flushes it.
        repeat: the name that gets a second slot, for the self-against-self spread.
    Raises:
        ProviderError: if a provider raises.
    """
    import torch

    slots = {p.name: p for p in providers}
    if repeat is not None:
        slots[repeat + AGAIN] = slots[repeat]
    if flush_bytes is None:
        flush_bytes = enough_to_flush(device)
    buffer = torch.zeros(flush_bytes, dtype=torch.uint8, device=device) if flush_bytes else None
    clock = clock_of(device)

    def sample(provider: Provider, buffer: Any) -> float:
        try:
            return clock(provider, buffer)
        except Exception as error:
            raise ProviderError(provider.name) from error

    warmup_ms = {p.name: sum(sample(p, None) for _ in range(warmup)) for p in providers}
    taken: dict[str, list[float]] = {name: [] for name in slots}
    order, shuffle = list(slots), random.Random(seed).shuffle
    for _ in range(samples):
        shuffle(order)
        for name in order:
            taken[name].append(sample(slots[name], buffer))
        yield {name: Timing(tuple(ms), warmup_ms[name.removesuffix(AGAIN)]) for name, ms in taken.items()}


def clock_of(device: str) -> Callable[[Provider, Any], float]:
    """Return what takes one sample of a provider on this device, in ms: on CUDA by the device's own events.

    It is given the provider, and what is written before it, or None.
    """
    return _cuda_ms if device.startswith("cuda") else _cpu_ms


def _cpu_ms(provider: Provider, buffer: Any) -> float:
    run = provider.fresh()
    if buffer is not None:
        buffer.add_(1)
    start = time.perf_counter_ns()
    result = run()
    end = time.perf_counter_ns()
    # freeing the result is not part of the work
    del result
    return (end - start) / 1e6


def _cuda_ms(provider: Provider, buffer: Any) -> float:
    import torch

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    run = provider.fresh()
    if buffer is not None:
        buffer.add_(1)
    # not waiting here: while the device flushes, the host launches what is to be timed
    start.record()
    result = run()
    end.record()
    torch.cuda.synchronize()
    del result
    return float(start.elapsed_time(end))
