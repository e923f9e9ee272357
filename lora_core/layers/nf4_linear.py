"""A frozen linear layer with an NF4 weight, and LoRA on it (QLoRA).

    y = x W^T + b + s (drop(x) A^T) B^T        W = dequantise(codes, absmax), made for the call and let go

Source: Dettmers et al. 2023, eq. 5.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lora_core.layers.adapter import beside
from lora_core.layers.as_written import runs_as_written
from lora_core.layers.linear import LoraLinear
from lora_core.ops.checks import autocast_on
from lora_core.ops.nf4_lora_linear import nf4_lora_linear
from lora_core.ops.packed import Packed
from lora_core.quant import QuantizedWeight, quantize, quantize_nf4


class NF4Linear(nn.Module):
    """A linear layer whose weight is frozen in 4 bits.

    Args:
        weight: the quantised weight, logical shape [N, K].
        bias: shape [N], or None.
        compute_dtype: dtype of the matrix product; None takes that of x.
    """

    bias: nn.Parameter | None

    def __init__(
        self, weight: QuantizedWeight, bias: nn.Parameter | None = None, compute_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = weight
        self.compute_dtype = compute_dtype
        self.register_parameter("bias", bias)
        self._register_state_dict_hook(_name_codes_weight)
        self.register_load_state_dict_post_hook(_name_missing_codes_weight)

    @classmethod
    def from_dense(
        cls, layer: Any, *, block_size: int, double_quant: bool, compute_dtype: torch.dtype | None, transposed: bool
    ) -> "NF4Linear":
        """Return a frozen NF4 layer with the weight and bias of a dense one.

        Args:
            layer: nn.Linear, or with transposed a layer that stores its weight as [K, N].
            block_size: elements sharing one scale; a power of two from 32 to 4096.
            double_quant: quantise the scales as well.
            compute_dtype: as in NF4Linear.
            transposed: the weight is stored as W^T.
        Raises:
            NonFiniteError: if the weight holds NaN or infinity.
            DtypeError: if it is not float32, float16 or bfloat16.
            ConfigError: if block_size or double_quant is none of these.
        """
        dense = layer.weight.detach()
        weight = quantize_nf4(dense.T if transposed else dense, block_size=block_size, double_quant=double_quant)
        bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)
        return cls(weight, bias, compute_dtype).train(layer.training)

    @property
    def in_features(self) -> int:
        return int(self.weight.shape[1])

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[0])

    def forward(self, input: Tensor) -> Tensor:
        """Return x W^T + b; x [..., K] in float32, float16, bfloat16 or float64, the result [..., N] in the same."""
        return self.with_adapter(input, None, None, 0.0, 0.0, None)

    def with_adapter(
        self,
        x: Tensor,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        scaling: float,
        dropout: float,
        seed: Tensor | None,
    ) -> Tensor:
        """Return x W^T + b + s (drop(x) A^T) B^T, computed in compute_dtype, in the dtype of x."""
        compute = x if self.compute_dtype is None or autocast_on(x) else x.to(self.compute_dtype)
        bias = self.bias if self.bias is None or autocast_on(x) else self.bias.to(compute.dtype)
        if lora_a is not None and lora_b is not None and not autocast_on(x):
            # model.half() and model.double() convert the matrices, and compute_dtype stays
            lora_a, lora_b = beside(compute.dtype, lora_a, lora_b)
        y = nf4_lora_linear(compute, self.weight, bias, lora_a, lora_b, scaling, dropout, seed)
        return y if autocast_on(x) else y.to(x.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}weight" in state_dict:
            state_dict[f"{prefix}weight.packed"] = state_dict.pop(f"{prefix}weight")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class LoraNF4Linear(LoraLinear):
    """LoRA on a frozen NF4 layer.

    Args:
        base_layer: NF4Linear.
    """

    base_layer: NF4Linear

    def is_as_written(self) -> bool:
        return runs_as_written(self.base_layer, NF4Linear.forward)

    def why_unmergeable(self) -> str:
        return "it is on the meta device and has no values" if self.weight.is_meta else ""

    def sample_input(self) -> Tensor:
        dtype = self.base_layer.compute_dtype or self.weight.dtype
        return torch.randn(2, self.in_features, dtype=dtype, device=self.weight.device)

    def one_operation(self, x: Tensor, name: str) -> Tensor:
        return self.base_layer.with_adapter(x, *self.adapter_operands(x, name))

    def weight_operand(self) -> Packed:
        return Packed.of(self.base_layer.weight)

    def read_weight(self) -> Tensor:
        return self.base_layer.weight.dequantize(torch.float32)

    @torch.no_grad()
    def write_weight(self, value: Tensor) -> None:
        """Requantise value in the base weight's own format."""
        old = self.base_layer.weight
        wide = value.to(torch.float32)
        new = quantize(wide, "nf4", old.block_size, old.double_quant, old.nested_block_size)
        self.restore_weight(dict(new.named_buffers()))

    def backup_weight(self) -> dict[str, Tensor]:
        return {k: v.detach().to("cpu", copy=True) for k, v in self.base_layer.weight.named_buffers()}

    @torch.no_grad()
    def restore_weight(self, backup: dict[str, Tensor]) -> None:
        for key, buffer in self.base_layer.weight.named_buffers():
            buffer.copy_(backup[key])


def _name_codes_weight(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Give the packed codes the key that bitsandbytes gives them: the layer's own "weight"."""
    state[f"{prefix}weight"] = state.pop(f"{prefix}weight.packed")


def _name_missing_codes_weight(module: nn.Module, incompatible: Any) -> None:
    """Call packed codes that a state dict lacks what it would have called them."""
    missing: list[str] = incompatible.missing_keys
    missing[:] = [key.removesuffix(".packed") if key.endswith("weight.packed") else key for key in missing]
