"""What the comparisons of norms, gates, rotations and attention have alike: each mode, beside PyTorch's ways."""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from benchmarks import modes
from benchmarks.case import Case, Check, Claim
from benchmarks.modes import Work
from benchmarks.peers import providers
from benchmarks.rounding import within_rounding

# results inside a formula, and inside its derivative, that are rounded to its dtype where it is written with PyTorch's
# operations: of a norm, of a gate with its silu, and of a rotation no more than so many
ROUNDINGS = 6


def cases(
    op: str,
    shape: dict[str, int],
    device: str,
    ours: Callable[..., Any],
    written: Callable[..., Any],
    others: Mapping[str, Callable[..., Any]],
    leaves: tuple[Any, ...],
    magnitudes: Callable[..., tuple[Any, ...]],
    sums: int,
    moved: Mapping[str, int],
    flops: Mapping[str, int] = MappingProxyType({}),
) -> Iterator[Case]:
    """Yield one comparison a mode.

    Args:
        op, shape, device: of the comparison.
        ours: the operation, taking the leaves.
        written: as transformers writes it, the truth in float64.
        others: more ways of PyTorch's, by name.
        leaves: what gradients are taken of.
        magnitudes: takes the leaves and dL/dy in float64, and returns what the terms of y, and of each gradient, add up
            to without their signs.
        sums: products added in float32 for one element.
        moved: bytes by mode.
        flops: likewise, where they count.
    """
    import torch

    d_y = torch.randn_like(written(*leaves))
    runs: dict[str, Callable[..., Any]] = {"lora_core": ours, "torch": written, **others}
    runs, missing = providers(runs, {"compiled": modes.compiled_peer(written, device)})
    works = {name: Work(run, leaves, written, leaves, sums) for name, run in runs.items()}
    for mode in modes.MODES:
        made = modes.providers(works, mode, d_y)
        yield Case(
            op=op,
            mode=mode,
            shape=shape,
            dtype=str(d_y.dtype).removeprefix("torch."),
            block_size=None,
            providers=made,
            check=_checker({p.name: p for p in made}, mode, written, leaves, d_y, magnitudes, sums),
            bytes_moved=moved[mode],
            flops=flops.get(mode),
            claims=(Claim(against="torch", no_slower=True),),
            missing=missing,
        )


def operands(device: str, *shapes: tuple[int, ...]) -> tuple[Any, ...]:
    """Return random tensors that take gradients, float32 on a CPU and bfloat16 on a GPU."""
    import torch

    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return tuple(torch.randn(*shape, device=device).to(dtype).requires_grad_() for shape in shapes)


def _checker(
    made: dict[str, Any],
    mode: str,
    written: Callable[..., Any],
    leaves: tuple[Any, ...],
    d_y: Any,
    magnitudes: Callable[..., tuple[Any, ...]],
    sums: int,
) -> Callable[[str], Check]:
    def compare(name: str) -> Check:
        import torch

        got = made[name].fresh()()
        wide = [t.detach().double().requires_grad_() for t in leaves]
        y = written(*wide)
        true = (y.detach(),) if mode == "fwd" else torch.autograd.grad(y, wide, d_y.double())
        of_y, *of_gradients = magnitudes(*(t.detach() for t in wide), d_y.double())
        expected = (of_y,) if mode == "fwd" else of_gradients
        results = (got,) if mode == "fwd" else got
        found = [within_rounding(g, t, m, sums, ROUNDINGS) for g, t, m in zip(results, true, expected, strict=True)]
        return max(found, key=lambda c: (not c.passed, c.max_error))

    return compare
