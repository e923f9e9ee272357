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
        uses_tensor_cores: it multiplies matrices, so its instructions must show it.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: int = 0
    uses_tensor_cores: bool = False
