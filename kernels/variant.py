"""What a kernel can be launched with: enough to compile it without a GPU, and to count what came out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_core.kernels.form import Form

# PyTorch's dtypes as Triton's signatures write them
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}

# dtypes of x and of A and B: adapters share the layer's dtype or are kept in float32
DTYPE_PAIRS = (
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
)


@dataclass(frozen=True)
class Variant:
    """One configuration of one kernel.

    Args:
        name: of the configuration, unique in its file.
        form: of the kernel.
        types: Triton's, such as "*bf16", of every argument but what is "i32": sizes, strides, counts (reach.py).
        constants: value of every constexpr.
        options: num_warps and other launch options.
        weights: output elements one program makes, for instructions per element; 0 where that says nothing.
        tile_m: rows of the tiles that tensor cores multiply; 0 where none do.
    """

    name: str
    form: Form
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: int = 0
    tile_m: int = 0

    @property
    def kernel(self) -> Any:
        """What @triton.jit makes of the kernel in this form."""
        return self.form.kernel

    @property
    def constant(self) -> dict[str, Any]:
        """Value of every argument that is compiled in."""
        return {**self.constants, **dict.fromkeys(self.form.ones, 1)}

    @property
    def signature(self) -> dict[str, str]:
        """Triton's type of every argument."""
        known = dict.fromkeys(self.constant, "constexpr")
        return {name: known.get(name) or self.types.get(name, "i32") for name in self.kernel.arg_names}

    @property
    def aligned(self) -> frozenset[str]:
        """Arguments that are multiples of 16."""
        return frozenset((*self.form.aligned, *self.form.addresses))


def least_that_holds(size: int, choice: Sequence[int]) -> int:
    """Return the first of some rising block sizes that holds so many elements, or the last."""
    return next((block for block in choice if size <= block), choice[-1])
