"""One batch of M rows with G adapters of ranks R, R / 2 and R / 4, beside a loop over the adapters.

Forward, backward with gradients of x, A and B, and both. bfloat16 on a GPU, float32 on a CPU. Every fourth row has no
adapter.
"""

from collections.abc import Iterator
from typing import Any

from benchmarks import modes
from benchmarks.case import Case, Claim
from benchmarks.modes import Work

SHAPES = ({"M": 64, "N": 512, "K": 512, "R": 16, "G": 15},)
GPU_SHAPES = tuple({"M": m, "N": 4096, "K": 4096, "R": 16, "G": 63} for m in (64, 512, 4096))


def cases(shape: dict[str, int], device: str) -> Iterator[Case]:
    """Yield one comparison a mode, for M rows, B_g [N, R_g] and A_g [R_g, K]."""
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
    d_y = torch.randn(m, n, device=device).to(dtype)
    rows = torch.arange(m, device=device)
    adapter = torch.where(rows % 4 == 3, -1, rows % adapters)
    scaling = torch.linspace(0.5, 2.0, adapters, device=device)
    ends = grouped.offsets(ranks)
    slices = [(g, slice(ends[g], ends[g + 1])) for g in range(adapters)]

    def loop(x: Any, a: Any, b: Any) -> Any:
        y = base.clone()
        for g, part in slices:
            mine = adapter == g
            y[mine] += scaling[g].to(dtype) * (x[mine] @ a[part].T @ b[:, part].T)
        return y

    def truth(x: Any, base: Any, a: Any, b: Any, d_y: Any) -> Any:
        y, hidden = grouped.forward(x, base, a, b, ranks, adapter, scaling.double())
        if d_y is None:
            return y
        return grouped.backward(d_y, None, x, a, b, ranks, adapter, scaling.double(), hidden, (True, True, True))

    leaves = tuple(t.requires_grad_() for t in (x, lora_a, lora_b))
    layers = {"lora_core": lambda x, a, b: grouped_lora(x, a, b, ranks, adapter, scaling, base), "torch": loop}
    operands = (x, base, lora_a, lora_b)
    works = {name: Work(layer, leaves, truth, operands, m + n + k + r) for name, layer in layers.items()}
    pairs = sum(ranks) * (k + n)
    # adapters, x, base and y; then adapters and their gradients, dL/dy, x and dL/dx
    moved = {"fwd": pairs + m * (k + 2 * n), "bwd": 2 * pairs + m * (2 * k + n)}
    # of rows that have an adapter, of its own rank
    flops = {"fwd": 2 * (k + n) * sum(ranks[g] for g in adapter.tolist() if g >= 0)}
    flops["bwd"] = 2 * flops["fwd"]
    for name in (moved, flops):
        name["fwdbwd"] = name["fwd"] + name["bwd"]
    for mode in modes.MODES:
        yield Case(
            op="grouped_lora",
            mode=mode,
            shape=shape,
            dtype=str(dtype).removeprefix("torch."),
            block_size=None,
            providers=modes.providers(works, mode, d_y),
            check=modes.check(works, mode, d_y),
            bytes_moved=dtype.itemsize * moved[mode],
            flops=flops[mode],
            # on a CPU the reference runs, which sorts the rows; a loop need not
            claims=() if device == "cpu" else (Claim(against="torch", no_slower=True),),
        )
