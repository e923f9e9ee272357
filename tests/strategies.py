"""Hypothesis strategies that the property tests share: sizes, dtypes, block sizes, ranks, and nasty values."""

import torch
from hypothesis import strategies as st

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

dtypes = st.sampled_from(DTYPES)
block_sizes = st.sampled_from(BLOCK_SIZES)
# dtypes of x and of A and B
dtype_pairs = st.sampled_from(
    [
        *((dtype, dtype) for dtype in DTYPES),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ]
)
# one, odd, prime, just over a tile
sizes = st.sampled_from([1, 2, 7, 16, 17, 33, 65, 131])
# of matrices: the same, and multiples of 16, whose elements are loaded many at once
widths = st.sampled_from([1, 7, 16, 33, 48, 65, 131, 144])
ranks = st.sampled_from([1, 3, 8, 16, 17, 33, 65, 130, 256])
dropouts = st.sampled_from([0.0, 0.1, 0.5, 0.9])
seeds = st.integers(0, 2**31 - 1)
# standard deviations of a tensor's values: zeros, subnormal, tiny, plain, huge
scales = st.sampled_from([0.0, 1e-40, 1e-30, 1e-3, 1.0, 1e4, 3e38])


def counts(most: int) -> st.SearchStrategy[int]:
    """Numbers of elements, 1 to most: any, whole words of eight codes, and whole words by fours."""
    return st.one_of(*(st.integers(1, most // unit).map(lambda n, unit=unit: n * unit) for unit in (1, 8, 32)))


def values(count: int, dtype: torch.dtype, scale: float, seed: int, mixed: bool = False) -> torch.Tensor:
    """Return count normal values of this scale, kept inside the dtype's range; mixed gives each its own magnitude."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=g)
    if mixed:
        x = x * 10.0 ** torch.randint(-8, 4, (count,), generator=g)
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return (x * scale).clamp(-largest, largest).to(dtype)


# how a matrix lies in memory: contiguous, by columns, every other column, one row for all, one element for all
layouts = st.sampled_from(["rows", "rows", "columns", "spread", "one row", "one element"])


def laid_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    """Return a matrix that lies so; of one row or element for all, its first one is repeated with a stride of 0."""
    if layout == "columns":
        return t.T.contiguous().T
    if layout == "spread":
        return t.repeat_interleave(2, 1)[:, ::2]
    repeated = {"one row": t[:1], "one element": t[:1, :1]}
    return repeated[layout].expand(t.shape) if layout in repeated else t


def linear_operands(
    m: int, n: int, k: int, r: int, dtype: torch.dtype, low: torch.dtype, seed: int, device: str = "cpu"
) -> tuple[torch.Tensor, ...]:
    """Return x [m, k], W [n, k], b [n], A [r, k] and B [n, r].

    One seed in four makes one of them each zero, mixed, subnormal and huge.
    """
    shapes = ((m, k, dtype), (n, k, dtype), (1, n, dtype), (r, k, low), (n, r, low))
    kinds = (seed // 4 + i for i in range(5)) if seed % 4 == 3 else (2,) * 5
    made = []
    for (rows, columns, own), kind in zip(shapes, kinds, strict=True):
        # mixed values end near 4, and none is huge in float16: S must stay below 65504
        half = torch.float16 in (dtype, low)
        subnormal = (0.1 * torch.finfo(own).smallest_normal, False)
        scale, mixed = [(0.0, False), (1e-3, True), (1.0, False), subnormal, (1.0 if half else 1e12, False)][kind % 5]
        made.append(values(rows * columns, own, scale, seed + len(made), mixed).view(rows, columns).to(device))
    made[2] = made[2][0]
    return tuple(made)


def spread(close: torch.Tensor, stride: int, along: int) -> torch.Tensor:
    """Return a copy with this stride between rows (along = 0) or columns (1), and the other ones side by side."""
    strides = (stride, 1) if along == 0 else (1, stride)
    size = sum((length - 1) * step for length, step in zip(close.shape, strides, strict=True)) + 1
    # a plain empty tensor would be filled, all of it
    memory = torch.UntypedStorage(size * close.element_size(), device=close.device)
    return torch.empty(0, dtype=close.dtype, device=close.device).set_(memory, 0, close.shape, strides).copy_(close)
