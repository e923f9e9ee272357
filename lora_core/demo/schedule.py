"""The learning rate over a run."""

import math

# the rate ends at this share of its peak
FLOOR = 0.05


def learning_rate_at(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear rise over the warm-up (a tenth of the run at most), then half a cosine down to FLOOR * peak.

    Source: Loshchilov and Hutter 2017, eq. 5, without restarts.
    """
    warmup = max(1, min(warmup, steps // 10))
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * done)))
