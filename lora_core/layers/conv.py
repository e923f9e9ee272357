"""LoRA on nn.Conv1d and nn.Conv2d.

    y = conv(x, W) + b + s conv_1x1(conv(drop(x), A), B)

A [R, C_in, k...] takes the base layer's stride, padding and dilation; B [C_out, R / groups, 1...] mixes the R
channels back. Source: PEFT's checkpoint format; loralib folds the kernel into the rank instead.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_core.errors import ConfigError
from lora_core.layers.adapter import AdapterLayer, reads_from_base
from lora_core.layers.as_written import runs_as_written
from lora_core.ops.checks import autocast_on

CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d}


@reads_from_base(
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"
)
class LoraConv(AdapterLayer):
    """A convolution with low-rank adapters.

    Args:
        base_layer: nn.Conv1d or nn.Conv2d; with groups, the rank has to be a multiple of them.
    """

    base_layer: Any

    def __init__(self, base_layer: nn.Conv1d | nn.Conv2d) -> None:
        super().__init__(base_layer)
        self.dimensions = base_layer.weight.dim() - 2

    def pair_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        base = self.base_layer
        if rank % base.groups:
            raise ConfigError(
                f"rank {rank} on a convolution with {base.groups} groups: want a multiple of the groups; "
                "set one with rank_pattern, or leave the layer out with exclude_modules"
            )
        ones = (1,) * self.dimensions
        return (rank, base.in_channels, *base.kernel_size), (base.out_channels, rank // base.groups, *ones)

    def why_unmergeable(self) -> str:
        if self.base_layer.groups > 1:
            return f"A mixes all input channels, its weight those of one of {self.base_layer.groups} groups"
        return super().why_unmergeable()

    def product(self, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        return (lora_b.flatten(1) @ lora_a.flatten(1)).view(self.weight.shape)

    def response(self, x: Tensor, change: Tensor) -> Tensor:
        return self.convolve(x, change)

    def sample_input(self) -> Tensor:
        base = self.base_layer
        sides = [2 * d * (k - 1) + 2 * s for d, k, s in zip(base.dilation, base.kernel_size, base.stride, strict=True)]
        return torch.randn(1, base.in_channels, *sides, dtype=self.weight.dtype, device=self.weight.device)

    def is_as_written(self) -> bool:
        return runs_as_written(self.base_layer, nn.Conv1d.forward if self.dimensions == 1 else nn.Conv2d.forward)

    def forward(self, input: Tensor) -> Tensor:
        """Return the base convolution's output with the running adapters added; shapes as the base layer's."""
        x, y = input, self.base_layer(input)
        for name in self.running():
            adapter, (lora_a, lora_b) = self.adapters[name], self.matrices(name, x)
            shared = x if autocast_on(x) else x.to(lora_a.dtype)
            dropped = F.dropout(shared, adapter.dropout, self.training)
            low_rank = CONVOLUTIONS[self.dimensions](
                self.convolve(dropped, lora_a), lora_b, groups=self.base_layer.groups
            )
            y = y + (low_rank * adapter.scaling).to(y.dtype)
        return self.handed_out(y)

    def convolve(self, x: Tensor, kernel: Tensor) -> Tensor:
        """Apply a kernel over all input channels where the base layer applies its own."""
        base, padding = self.base_layer, self.base_layer.padding
        if base.padding_mode != "zeros":
            x = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
            padding = 0
        return CONVOLUTIONS[self.dimensions](x, kernel, stride=base.stride, padding=padding, dilation=base.dilation)
