"""PyTorch operations lora_core::*: schema, checks, reference body, fake, gradient."""

# QuantizedWeight asks for it by name
from lora_core.ops import dequantize  # noqa: F401
