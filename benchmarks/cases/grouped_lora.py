"""One batch of M rows with G adapters of ranks R, R / 2 and R / 4, each row with its own adapter or with none.

Beside it plain PyTorch, adapter by adapter on the rows sorted once ("torch") and as one product with all adapters, of
which each row keeps its own ("torch masked", under torch.compile "compiled"), and forward PEFT's `adapter_names`.
Forward, backward with gradients of x, A and B, and both. bfloat16 on a GPU, float32 on a CPU. Every fourth row has no
adapter.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks import modes
from benchmarks.case import Case, Claim
from benchmarks.modes import Work
from benchmarks.peers import Peer, providers

SHAPES = ({"M": 64, "N": 512, "K": 512, "R": 16, "G": 15},)
GPU_SHAPES = tuple({"M": m, "N": 4096, "K": 4096, "R": 16, "G": 63} for m in (64, 512, 4096))

# the two ways to write it in PyTorch
WRITTEN = ("torch", "torch masked")


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
    has_one = torch.arange(m, device=device) % 4 != 3
    # one after another over the rows that have one, so that each adapter has its turn
    adapter = torch.where(has_one, (has_one.cumsum(0) - 1) % adapters, -1)
    scaling = torch.linspace(0.5, 2.0, adapters, device=device)

    def truth(x: Any, base: Any, a: Any, b: Any, d_y: Any) -> Any:
        y, hidden = grouped.forward(x, base, a, b, ranks, adapter, scaling.double())
        if d_y is None:
            return y
        return grouped.backward(d_y, x, a, b, ranks, adapter, scaling.double(), hidden, (True, True, True))

    leaves = tuple(t.requires_grad_() for t in (x, lora_a, lora_b))
    operands = (x, base, lora_a, lora_b)
    masked = _masked(base, ranks, adapter, scaling)
    ours = {
        "lora_core": lambda x, a, b: grouped_lora(x, a, b, ranks, adapter, scaling, base),
        **dict(zip(WRITTEN, (_sorted(base, ranks, adapter, scaling), masked), strict=True)),
    }
    peers = {
        "compiled": modes.compiled_peer(masked, device),
        "peft": Peer(("peft",), lambda: _peft(base, (lora_a, lora_b), ranks, adapter, scaling)),
    }
    layers, missing = providers(ours, peers)
    works = {name: Work(layer, leaves, truth, operands, m + n + k + r) for name, layer in layers.items()}
    for mode in modes.MODES:
        left_out = {} if mode == "fwd" else {"peft": "mixes adapters in one batch at inference alone"}
        compared = {name: work for name, work in works.items() if name not in left_out}
        moved, flops = least(shape, ranks, adapter.tolist(), mode)
        yield Case(
            op="grouped_lora",
            mode=mode,
            shape=shape,
            dtype=str(dtype).removeprefix("torch."),
            block_size=None,
            providers=modes.providers(compared, mode, d_y),
            check=modes.check(compared, mode, d_y),
            bytes_moved=dtype.itemsize * moved,
            flops=flops,
            # on a CPU a call costs more than such a product does
            claims=() if device == "cpu" else tuple(Claim(against=name, no_slower=True) for name in WRITTEN),
            missing=missing | left_out,
        )


def least(shape: dict[str, int], ranks: Sequence[int], adapter: Sequence[int], mode: str) -> tuple[int, int]:
    """Return the elements to move and the operations, at least: of rows that have an adapter, and of its own rank.

    An adapter without rows is not read; its gradient is written all the same.
    """
    m, n, k = (shape[name] for name in "MNK")
    own = [g for g in adapter if g >= 0]
    read, written = ((k + n) * sum(ranks[g] for g in each) for each in (set(own), range(len(ranks))))
    products = 2 * (k + n) * sum(ranks[g] for g in own)
    x, d_y = len(own) * k, len(own) * n
    # base and y; dL/dx
    forward, backward = 2 * m * n, d_y + m * k + written
    return {
        "fwd": (read + x + forward, products),
        "bwd": (read + x + backward, 2 * products),
        "fwdbwd": (read + x + forward + backward, 3 * products),
    }[mode]


def _sorted(base: Any, ranks: Sequence[int], adapter: Any, scaling: Any) -> Callable[..., Any]:
    """Return the loop over adapters that finds all their rows at once, and gathers and adds them at once."""
    import torch

    def layer(x: Any, a: Any, b: Any) -> Any:
        none, *counts = torch.bincount(adapter + 1, minlength=len(ranks) + 1).tolist()
        rows = adapter.argsort()[none:]
        parts = zip(x.index_select(0, rows).split(counts), a.split(ranks), b.T.split(ranks), strict=True)
        updates = torch.cat([x_g @ a_g.T @ b_g for x_g, a_g, b_g in parts])
        return base.index_add(0, rows, updates * scaling.to(base.dtype)[adapter[rows], None])

    return layer


def _masked(base: Any, ranks: Sequence[int], adapter: Any, scaling: Any) -> Callable[..., Any]:
    """Return two products with all adapters, between which each row keeps what is its own adapter's."""
    import torch

    owner = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks)).to(adapter.device)

    def layer(x: Any, a: Any, b: Any) -> Any:
        factors = torch.where(adapter[:, None] == owner, scaling.to(base.dtype)[owner], 0)
        return torch.addmm(base, x @ a.T * factors, b.T)

    return layer


def _peft(base: Any, pair: tuple[Any, Any], ranks: Sequence[int], adapter: Any, scaling: Any) -> Callable[..., Any]:
    """Return PEFT's layer with these adapters, on one whose output is a copy of `base`: PEFT adds into it."""
    import peft
    from torch import nn

    class Held(nn.Module):
        def forward(self, x: Any) -> Any:
            return base.clone()

    def config(g: int) -> Any:
        return peft.LoraConfig(r=ranks[g], lora_alpha=float(scaling[g]) * ranks[g], target_modules=["0"])

    shaped = nn.Linear(pair[0].shape[1], len(pair[1]), bias=False, dtype=base.dtype, device=base.device)
    model = peft.get_peft_model(nn.Sequential(shaped), config(0), adapter_name="0")
    for g in range(1, len(ranks)):
        model.add_adapter(str(g), config(g))
    layer = model.base_model.model[0]
    for g, (a_g, b_g) in enumerate(zip(pair[0].split(ranks), pair[1].split(ranks, 1), strict=True)):
        layer.lora_A[str(g)].weight, layer.lora_B[str(g)].weight = (
            nn.Parameter(t.detach().contiguous()) for t in (a_g, b_g)
        )
    layer.base_layer = Held()
    names = ["__base__" if g < 0 else str(g) for g in adapter.tolist()]
    return lambda x, a, b: layer(x, adapter_names=names)
