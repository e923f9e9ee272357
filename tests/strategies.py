"""Hypothesis strategies that the property tests share: sizes, dtypes, block sizes, ranks, and nasty values."""

import torch
from hypothesis import strategies as st

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

dtypes = st.sampled_from(DTYPES)
block_sizes = st.sampled_from(BLOCK_SIZES)
seeds = st.integers(0, 2**31 - 1)
# standard deviations of a tensor's values: zeros, subnormal, tiny, plain, huge
scales = st.sampled_from([0.0, 1e-40, 1e-30, 1e-3, 1.0, 1e4, 3e38])


def values(count: int, dtype: torch.dtype, scale: float, seed: int, mixed: bool = False) -> torch.Tensor:
    """Return count normal values of this scale, kept inside the dtype's range; mixed gives each its own magnitude."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=g)
    if mixed:
        x = x * 10.0 ** torch.randint(-8, 4, (count,), generator=g)
    largest = torch.finfo(dtype).max
    return (x * scale).clamp(-largest, largest).to(dtype)
