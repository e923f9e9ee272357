"""What quantising does to the base's weights, and how much of a full update a low rank holds."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_core.demo.base import QLORA, Base
from lora_core.quant import quantize

# name shown, type, double quantisation
FORMATS = (
    ("NF4, double quantised", "nf4", True),
    ("NF4", "nf4", False),
    ("FP4", "fp4", False),
    ("int4", "int4", False),
)
# the histogram's range, in units of a block's largest weight
HISTOGRAM_RANGE = 0.16
HISTOGRAM_BINS = 81


@dataclass(frozen=True)
class QuantizationError:
    """How far one 4-bit format moves the base's weights.

    Args:
        relative_error: ||dequantised - W|| / ||W|| over all linear layers.
        bits: per weight, scales included.
        histogram: share of weights in each bin of error / (largest weight of the block).
    """

    name: str
    relative_error: float
    bits: float
    histogram: list[float]


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one matrix's update, largest first, and the share of its energy in the first r."""

    name: str
    singular_values: list[float]
    energy_in_rank: float


def quantization_errors(base: Base) -> list[QuantizationError]:
    """The error of each 4-bit format on the base's linear layers."""
    weights = [module.weight.detach() for module in base.model().modules() if isinstance(module, nn.Linear)]
    return [_quantization_error(weights, *kind) for kind in FORMATS]


def _quantization_error(weights: list[Tensor], name: str, kind: str, double_quant: bool) -> QuantizationError:
    error = size = count = bits = 0.0
    histogram = torch.zeros(HISTOGRAM_BINS)
    for weight in weights:
        held = quantize(weight, quant_type=kind, block_size=QLORA.block_size, double_quant=double_quant)
        difference = held.dequantize(torch.float32) - weight
        largest = weight.reshape(-1, QLORA.block_size).abs().amax(1, keepdim=True)
        relative = difference.view(-1, QLORA.block_size) / largest
        histogram += torch.histc(relative, HISTOGRAM_BINS, -HISTOGRAM_RANGE, HISTOGRAM_RANGE)
        error += difference.double().square().sum().item()
        size += weight.double().square().sum().item()
        bits += 8 * held.nbytes
        count += weight.numel()
    return QuantizationError(name, (error / size) ** 0.5, bits / count, (histogram / count).tolist())


def update_spectra(base: Base, trained: nn.Module, rank: int) -> list[Spectrum]:
    """Singular values of Delta W = W after - W before, for each linear layer."""
    before = base.model()
    spectra = []
    for name, module in before.named_modules():
        if isinstance(module, nn.Linear):
            delta = trained.get_parameter(f"{name}.weight").detach().cpu() - module.weight.detach()
            values = torch.linalg.svdvals(delta.double())
            energy = values.square()
            spectra.append(Spectrum(name, values.tolist(), (energy[:rank].sum() / energy.sum()).item()))
    return spectra
