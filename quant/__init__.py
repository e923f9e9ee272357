"""Quantised weights: codebooks, packing, block-wise and double quantisation, and bitsandbytes' format."""

from lora_core.quant.quantize import quantize, quantize_nf4
from lora_core.quant.weight import QuantizedWeight

__all__ = ["QuantizedWeight", "quantize", "quantize_nf4"]
