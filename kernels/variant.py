"""What a kernel can be launched with: enough to compile it without a GPU, and to count what came out."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

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
        kernel: the @triton.jit function.
        signature: Triton type of every argument that is not constexpr, such as "*bf16" or "i64".
        aligned: arguments, besides pointers, that are multiples of 16.
        constants: value of every constexpr.
        options: num_warps and other launch options.
        weights: output elements one program makes, for instructions per element; 0 where that says nothing.
        tile_m: rows of the tiles that tensor cores multiply; 0 where none do.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: int = 0
    tile_m: int = 0
