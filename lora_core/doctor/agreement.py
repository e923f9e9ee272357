"""Whether a result is the reference's, up to rounding."""

from collections.abc import Callable

import torch
from torch import Tensor

from lora_core.doctor.cases import SCALING, Operands
from lora_core.reference import lora

# results inside a formula that are rounded to its output's dtype, at most
ROUNDINGS = 5


class Disagreement(Exception):
    """An operation's result is not the reference's."""


def double(t: Tensor) -> Tensor:
    """Return a tensor in float64 on the CPU, where the reference is computed."""
    return t.detach().cpu().double()


def magnitude_of(t: Tensor) -> Tensor:
    """Return a tensor's magnitudes, likewise."""
    return double(t).abs()


def on_cpu(mask: tuple[float, Tensor]) -> tuple[float, Tensor]:
    """Return a dropout and its seed, likewise."""
    return mask[0], mask[1].cpu()


def within(got: Tensor, truth: Tensor, magnitude: Tensor, products: int) -> bool:
    """Say whether float32 sums of so many products are right up to rounding; docs/guides/numerics.md.

    In half precision rounding allows one element much; all together are off by no more than ROUNDINGS times what one
    rounding of the truth may be off by.
    """
    error, unit = (double(got) - truth).abs(), torch.finfo(got.dtype).eps / 2
    bound = 2.0 * torch.finfo(torch.float32).eps * (products + 2) ** 0.5 * magnitude
    if got.dtype not in (torch.float32, torch.float64):
        bound += ROUNDINGS * unit * magnitude
        if not error.norm() <= ROUNDINGS * unit * truth.norm():
            return False
    return bool((error <= bound).all())


def require_close(got: Tensor, o: Operands, weight: Tensor) -> None:
    """Raise Disagreement unless y is the reference's for these operands, with this W in place of theirs."""

    def y(wide: Callable[[Tensor], Tensor]) -> Tensor:
        return lora.lora_linear(wide(o.x), wide(weight), wide(o.bias), wide(o.a), wide(o.b), SCALING, *on_cpu(o.mask))

    require(within(got, y(double), y(magnitude_of), o.x.shape[1] + len(o.a)), "outside the rounding bound")


def require(agrees: bool, otherwise: str) -> None:
    """Raise Disagreement, with this message, unless it agrees."""
    if not agrees:
        raise Disagreement(otherwise)
