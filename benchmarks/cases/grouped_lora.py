"""One batch of M rows with G adapters of ranks R, R / 2 and R / 4, beside a loop over the adapters.

bfloat16 on a GPU, float32 on a CPU. Every fourth row has no adapter.
"""

from collections.abc import Iterator
from typing import Any

from benchmarks.case import Case, Claim, Provider
from benchmarks.rounding import within_rounding

SHAPES = ({"M": 64, "N": 512, "K": 512, "R": 16, "G": 15},)
GPU_SHAPES = tuple({"M": m, "N": 4096, "K": 4096, "R": 16, "G": 63} for m in (64, 512, 4096))


def cases(shape: dict[str, int], device: str) -> Iterator[Case]:
    """Yield the one comparison for M rows, B_g [N, R_g] and A_g [R_g, K]."""
    import torch

    from lora_core.ops.grouped_lora import grouped_lora
    from lora_core.reference import grouped

    m, n, k, r, adapters = (shape[name] for name in "MNKRG")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    ranks = [max(r >> (g % 3), 1) for g in range(adapters)]
    torch.manual_seed(0)
    x, base, lora_a, lora_b = (
        torch.randn(*size, device=device).to(dtype) for size in ((m, k), (m, n), (sum(ranks), k), (n, sum(ranks)))
    )
    rows = torch.arange(m, device=device)
    adapter = torch.where(rows % 4 == 3, -1, rows % adapters)
    scaling = torch.linspace(0.5, 2.0, adapters, device=device)
    ends = grouped.offsets(ranks)
    slices = [(g, slice(ends[g], ends[g + 1])) for g in range(adapters)]

    def loop() -> Any:
        y = base.clone()
        for g, part in slices:
            mine = adapter == g
            y[mine] += scaling[g].to(dtype) * (x[mine] @ lora_a[part].T @ lora_b[:, part].T)
        return y

    runs = {"lora_core": lambda: grouped_lora(x, lora_a, lora_b, ranks, adapter, scaling, base), "torch": loop}
    wide = [t.double() for t in (x, base, lora_a, lora_b)]
    truth, magnitude = (
        grouped.forward(*(t.abs() if absolute else t for t in wide), ranks, adapter, scaling.double())[0]
        for absolute in (False, True)
    )
    yield Case(
        op="grouped_lora",
        mode="fwd",
        shape=shape,
        dtype=str(dtype).removeprefix("torch."),
        block_size=None,
        providers=[Provider(name, run) for name, run in runs.items()],
        check=lambda name: within_rounding(runs[name](), truth, magnitude, k + r + 2, roundings=4),
        bytes_moved=dtype.itemsize * (sum(ranks) * (k + n) + m * (k + 2 * n)),
        flops=2 * m * (k + n) * sum(ranks) // adapters,
        # on a CPU the reference runs, which sorts the rows; a loop need not
        claims=() if device == "cpu" else (Claim(against="torch", no_slower=True),),
    )
