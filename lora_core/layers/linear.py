"""LoRA on nn.Linear, and on transformers' Conv1D, whose weight is stored transposed.

    y = x W^T + b + s (drop(x) A^T) B^T        x [..., K], W [N, K], A [R, K], B [N, R]

Source: Hu et al. 2021, eq. 3.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.errors import ConfigError
from lora_core.layers.adapter import AdapterLayer, beside
from lora_core.layers.as_written import runs_as_written
from lora_core.layers.dropout import fresh_seed
from lora_core.ops.checks import autocast_on
from lora_core.ops.lora_linear import lora_linear
from lora_core.reference.lora import lora_delta


class LoraLinear(AdapterLayer):
    """A linear layer with low-rank adapters.

    Args:
        base_layer: nn.Linear, weight [N, K].
    """

    @property
    def in_features(self) -> int:
        return int(self.base_layer.in_features)

    @property
    def out_features(self) -> int:
        return int(self.base_layer.out_features)

    def pair_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, self.in_features), (self.out_features, rank)

    def product(self, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        return lora_b @ lora_a

    def response(self, x: Tensor, change: Tensor) -> Tensor:
        return x @ change.T

    def sample_input(self) -> Tensor:
        return torch.randn(2, self.in_features, dtype=self.weight.dtype, device=self.weight.device)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output with the running adapters added.

        Args:
            input: x, shape [..., K], in the base weight's dtype; called as PyTorch's layers call it.
            args: passed on to the base layer, as kwargs are.
        Returns:
            Shape [..., N], the base output's dtype.
        Raises:
            ConfigError: if the base layer returns something else than a tensor.
            DeviceError: if an adapter's matrices are on another device than x.
        """
        x, names = input, list(self.running())
        if names and not args and not kwargs and not getattr(x, "is_nested", False) and self.is_as_written():
            y = self.one_operation(x, names.pop(0))
        else:
            y = self.base_layer(x, *args, **kwargs)
        if not isinstance(y, Tensor):
            raise ConfigError(
                f"a {type(self.base_layer).__name__} returns a {type(y).__name__}, to which no update can be added: "
                "leave it out with exclude_modules"
            )
        for name in names:
            y = y + self.low_rank(x, name).to(y.dtype)
        for lora_a, lora_b, scaling in self.owed():
            start = lora_delta(x.to(lora_a.dtype), lora_a.to(x.device), lora_b.to(x.device), scaling)
            y = y + start.to(y.dtype)
        return self.handed_out(y)

    def is_as_written(self) -> bool:
        return runs_as_written(self.base_layer, nn.Linear.forward)

    def one_operation(self, x: Tensor, name: str) -> Tensor:
        """Return base and one adapter in one operation: its backward never keeps or forms a dense update."""
        lora_a, lora_b, scaling, dropout, seed = self.adapter_operands(x, name)
        if not lora_a.dtype == lora_b.dtype == x.dtype and not autocast_on(x):
            # model.half() and the like convert all, or some
            lora_a, lora_b = beside(x.dtype, lora_a, lora_b)
        return lora_linear(x, self.weight_operand(), self.bias, lora_a, lora_b, scaling, dropout, seed)

    def weight_operand(self) -> Any:
        """Return W [N, K] as the operation takes it."""
        return self.weight

    def adapter_operands(self, x: Tensor, name: str) -> tuple[Tensor, Tensor, float, float, Tensor | None]:
        """Return A, B, scaling, dropout probability and mask seed for one forward."""
        dropout = self.dropout_of(name)
        return *self.matrices(name, x), self.adapters[name].scaling, dropout, fresh_seed(x.device) if dropout else None

    def dropout_of(self, name: str) -> float:
        """Return the probability with which an adapter drops elements of x as the layer is now."""
        return self.adapters[name].dropout if self.training else 0.0

    def low_rank(self, x: Tensor, name: str) -> Tensor:
        """Return s (drop(x) A^T) B^T alone, in the adapter's dtype."""
        lora_a, lora_b, scaling, dropout, seed = self.adapter_operands(x, name)
        if not autocast_on(x):
            x = x.to(lora_a.dtype)
        return lora_delta(x, lora_a, lora_b, scaling, dropout, seed)


class LoraTransposedLinear(LoraLinear):
    """LoRA on a layer that stores W^T: transformers' Conv1D, weight [K, N]."""

    @property
    def in_features(self) -> int:
        return int(self.base_layer.weight.shape[0])

    @property
    def out_features(self) -> int:
        return int(self.base_layer.weight.shape[1])

    def product(self, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        return (lora_b @ lora_a).T

    def response(self, x: Tensor, change: Tensor) -> Tensor:
        return x @ change

    def is_as_written(self) -> bool:
        # the base layer is of this class: its module is loaded
        return runs_as_written(self.base_layer, sys.modules["transformers.pytorch_utils"].Conv1D.forward)

    def weight_operand(self) -> Any:
        return self.weight.T
