"""QLoRA's frozen base: which 4-bit format the weights are held in."""

from dataclasses import dataclass

import torch

from lora_core.dtypes import FLOATS
from lora_core.errors import ConfigError
from lora_core.methods.fields import checks_field_names
from lora_core.quant.blockwise import check_block_size


@checks_field_names
@dataclass(frozen=True, kw_only=True)
class NF4Config:
    """How quantize_model stores weights.

    Args:
        block_size: elements sharing one scale; a power of two from 32 to 4096.
        double_quant: store the scales in 8 bits.
        compute_dtype: dtype of the matrix products; None takes that of the layer's input.
    Raises:
        ConfigError: on an unknown field or a value that cannot work.
    Source: Dettmers et al. 2023 (arXiv 2305.14314), section 3.
    """

    block_size: int = 64
    double_quant: bool = True
    compute_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_size", check_block_size("NF4Config", self.block_size))
        if not isinstance(self.double_quant, bool):
            raise ConfigError(f"NF4Config: double_quant is {self.double_quant!r}; want True or False")
        compute = self.compute_dtype
        if compute is not None and compute not in FLOATS:
            raise ConfigError(
                f"NF4Config: compute_dtype is {compute!r}; want one of {', '.join(map(str, FLOATS))}, or None"
            )
