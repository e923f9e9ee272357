"""How far a 4-bit weight is from what it was made of, and how often it uses each level.

relative = ||W^ - W|| / ||W||        SNR = -20 log10(relative), in decibels        share_k = #{i: code_i = k} / n
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_core.errors import ShapeError
from lora_core.quant.packing import unpack
from lora_core.quant.weight import QuantizedWeight


@dataclass(frozen=True)
class WeightError:
    """The error of one quantised weight.

    Args:
        mean_square: mean of (W^ - W)^2.
        relative: ||W^ - W|| / ||W||, Frobenius norms; 0 where nothing was lost, of a zero weight too.
        largest: the largest |W^ - W|.
    """

    mean_square: float
    relative: float
    largest: float

    @property
    def snr_db(self) -> float:
        """Return the signal-to-noise ratio in decibels: infinite where nothing was lost."""
        return -20 * math.log10(self.relative) if self.relative else math.inf


def weight_error(weight: Tensor, held: QuantizedWeight) -> WeightError:
    """Return how far held, decoded in float32, is from weight; sums in float64.

    Args:
        weight: floating, of the shape of held, at least one element.
        held: what became of it.
    Raises:
        ShapeError: if the shapes differ or there is no element.
    Source: the usual measure, relative in the Frobenius norm. Yoshida 2023 (arXiv 2306.06965) chooses codebooks by the
        expected absolute error instead.
    """
    if weight.shape != held.shape or not weight.numel():
        raise ShapeError(
            f"weight_error: weight {tuple(weight.shape)} and quantised weight {tuple(held.shape)}; want one shape, "
            "not empty: pass the weight that was quantised"
        )
    truth = weight.detach().double()
    difference = held.dequantize(torch.float32).double() - truth
    noise, signal = difference.norm().item(), truth.norm().item()
    return WeightError(
        mean_square=difference.square().mean().item(),
        relative=noise / signal if signal else (math.inf if noise else 0.0),
        largest=difference.abs().max().item(),
    )


def level_shares(held: QuantizedWeight) -> Tensor:
    """Return the share of weights on each level, by code: float64 [16], which sums to 1.

    Args:
        held: at least one element.
    Raises:
        ShapeError: if it is empty.
    """
    if not held.numel():
        raise ShapeError(f"level_shares: a weight of shape {tuple(held.shape)} uses no level; want one with elements")
    codes = unpack(held.codes, held.numel())
    return torch.bincount(codes.long(), minlength=16).double() / held.numel()
