"""A layer's forward, its backward, or both, as the work of a provider; and whether its result is right."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks import record
from benchmarks.case import Check, Provider
from benchmarks.peers import Peer, told
from benchmarks.rounding import within_rounding

MODES = record.MODES


@dataclass(frozen=True)
class Work:
    """A layer that one provider runs.

    Args:
        layer: takes the leaves, returns y.
        leaves: what gradients are taken of.
        truth: in float64 and of absolute values likewise: takes the operands and d_y (None for the forward) and
            returns y, or the gradients of the leaves.
        operands: what truth takes, in the dtype that the layer has them in.
        products: summed in float32 for one element of any result.
    """

    layer: Callable[..., Any]
    leaves: tuple[Any, ...]
    truth: Callable[..., Any]
    operands: tuple[Any, ...]
    products: int


# results inside a layer's formula that are rounded to its dtype: base product, hidden state, update, scaling, sum
ROUNDINGS = 5


def compiled(layer: Callable[..., Any]) -> Callable[..., Any]:
    """Return a layer under torch.compile, for the shapes of one comparison.

    What was compiled for earlier shapes is forgotten, as past a number of graphs PyTorch runs a function uncompiled.
    Should it come to that all the same, it raises.
    """
    import torch

    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(layer, dynamic=False)


def compiled_peer(layer: Callable[..., Any], device: str) -> Peer:
    """Return a layer under torch.compile as a provider that not every machine can run."""
    return Peer((), lambda: compiled(layer), unfit=why_uncompiled(device))


@functools.cache
def why_uncompiled(device: str) -> str:
    """Return why torch.compile cannot be used on this device, as without a C++ compiler, or "" if it can."""
    import torch

    try:
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
    except Exception as error:
        return f"torch.compile does not work here: {told(error)}"
    return ""


def providers(works: Mapping[str, Work], mode: str, d_y: Any) -> list[Provider]:
    """Return the works in one mode."""
    return [_provider(name, work, mode, d_y) for name, work in works.items()]


def _provider(name: str, work: Work, mode: str, d_y: Any) -> Provider:
    import torch

    def forward() -> Any:
        with torch.no_grad():
            return work.layer(*work.leaves)

    def backward(y: Any) -> Any:
        return torch.autograd.grad(y, work.leaves, d_y)

    if mode == "fwd":
        return Provider(name, forward)
    if mode == "bwd":
        return Provider(name, backward, prepare=lambda: work.layer(*work.leaves))
    return Provider(name, lambda: backward(work.layer(*work.leaves)))


def check(works: Mapping[str, Work], mode: str, d_y: Any) -> Callable[[str], Check]:
    """Return what compares a provider's result in this mode with the truth; of several tensors the worst counts."""
    given = None if mode == "fwd" else d_y
    # the providers of one case have it in common, and it takes longer than they do
    kept: dict[tuple[Any, ...], list[tuple[Any, Any, list[Any]]]] = {}

    def expected(work: Work) -> list[tuple[Any, Any, list[Any]]]:
        """Return of each result the truth, its magnitude and its parts."""
        key = (work.truth, *map(id, work.operands))
        if key not in kept:
            kept.clear()
            truths, magnitudes = (_true(work, work.operands, given, absolute) for absolute in (False, True))
            lacking = [_true(work, operands, given) for operands in _without_each(work.operands)]
            kept[key] = [
                (truth, magnitude, [truth - less for less in without])
                for truth, magnitude, *without in zip(truths, magnitudes, *lacking, strict=True)
            ]
        return kept[key]

    def compare(name: str) -> Check:
        work = works[name]
        made = _provider(name, work, mode, d_y).fresh()()
        results = (made,) if given is None else made
        found = [
            within_rounding(got, truth, magnitude, work.products, ROUNDINGS, parts)
            for got, (truth, magnitude, parts) in zip(results, expected(work), strict=True)
        ]
        return max(found, key=lambda c: (not c.passed, c.max_error))

    return compare


def _true(work: Work, operands: tuple[Any, ...], d_y: Any, absolute: bool = False) -> tuple[Any, ...]:
    """Return the true results in float64, or those on absolute values."""
    results = work.truth(*(_wide(t, absolute) for t in operands), _wide(d_y, absolute))
    return (results,) if d_y is None else tuple(results)


def _without_each(operands: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Yield the operands with one tensor after another, but for x, set to zero."""
    for i, operand in enumerate(operands[1:], 1):
        if operand is not None and not isinstance(operand, float):
            yield (*operands[:i], operand * 0, *operands[i + 1 :])


def _wide(t: Any, absolute: bool) -> Any:
    if t is None or isinstance(t, float):
        return t
    wide = t.detach().double()
    return wide.abs() if absolute else wide


def lora_truth(x: Any, weight: Any, bias: Any, lora_a: Any, lora_b: Any, scaling: float, d_y: Any) -> Any:
    """Return y of a LoRA linear layer, or with d_y the gradients of x, A and B."""
    hidden = x @ lora_a.T
    if d_y is None:
        y = x @ weight.T + scaling * hidden @ lora_b.T
        return y if bias is None else y + bias
    d_s = scaling * d_y @ lora_b
    return d_y @ weight + d_s @ lora_a, d_s.T @ x, scaling * d_y.T @ hidden


def linear_truth(x: Any, weight: Any, bias: Any, d_y: Any) -> Any:
    """Return y of a linear layer, or with d_y the gradient of x."""
    if d_y is not None:
        return (d_y @ weight,)
    return x @ weight.T if bias is None else x @ weight.T + bias
