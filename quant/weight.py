"""QuantizedWeight: a frozen weight in 4 bits, with what is needed to get it back."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.errors import CheckpointError, ConfigError
from lora_core.quant import bitsandbytes, operations
from lora_core.quant.blockwise import check_block_size, check_nested_block_size
from lora_core.quant.double import NESTED_BLOCK_SIZE
from lora_core.quant.parts import check_dtype, check_four_bit, check_parts

PARTS = ("codes", "absmax", "nested_absmax", "nested_offset")


class QuantizedWeight(nn.Module):
    """A weight of any shape held as 4-bit codes and block scales; made by quantize or from_bitsandbytes.

    Moving it between devices moves all it holds. Casting it, as model.half() does, changes nothing: codes stay bytes
    and scales stay float32.

    Args:
        codes: packed, uint8 [(n + 1) // 2, 1].
        absmax: float32 [ceil(n / block_size)], or uint8 where the scales are quantised.
        nested_absmax: float32 [ceil(len(absmax) / nested_block_size)] where they are, else None.
        nested_offset: float32 [] where they are, else None.
        shape: of the weight.
        dtype: of the original weight, which dequantize returns by default.
        quant_type: "nf4", "fp4" or "int4".
        block_size: elements sharing one scale.
        nested_block_size: scales sharing one second-level scale.
    Raises:
        ShapeError, DtypeError, DeviceError, ConfigError: if the parts do not belong together.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        nested_offset: Tensor | None,
        *,
        shape: torch.Size,
        dtype: torch.dtype,
        quant_type: str = "nf4",
        block_size: int = 64,
        nested_block_size: int = NESTED_BLOCK_SIZE,
    ) -> None:
        super().__init__()
        check_parts(
            "QuantizedWeight", codes, absmax, nested_absmax, nested_offset, shape, block_size, nested_block_size
        )
        check_four_bit(quant_type)
        check_dtype("QuantizedWeight: dtype is", dtype)
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", absmax)
        self.register_buffer("nested_absmax", nested_absmax)
        self.register_buffer("nested_offset", nested_offset)
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.quant_type = quant_type
        self.block_size = check_block_size("QuantizedWeight", block_size)
        self.nested_block_size = check_nested_block_size("QuantizedWeight", nested_block_size)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return codes, absmax, nested_absmax and nested_offset, which are asked for at every forward."""
        # PyTorch's way to a buffer's name raises and catches an AttributeError first; a part may be held elsewhere
        held: dict[str, Any] = self._buffers
        codes, absmax, *nested = (held[name] if name in held else getattr(self, name) for name in PARTS)
        return codes, absmax, *nested

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, wanted: bool) -> None:
        if wanted:
            raise ConfigError(
                "a 4-bit weight takes no gradient: train an adapter on it, or the weight before quantising"
            )

    @property
    def is_meta(self) -> bool:
        return self.codes.is_meta

    @property
    def double_quant(self) -> bool:
        """Say whether the scales are quantised too."""
        return self.nested_absmax is not None

    @property
    def nbytes(self) -> int:
        """Return the bytes that codes and scales take."""
        return sum(b.numel() * b.element_size() for b in self.buffers())

    @property
    def bits_per_parameter(self) -> float:
        """Return the bits held per weight, scales included; 0 for an empty weight."""
        return 8 * self.nbytes / self.shape.numel() if self.shape.numel() else 0.0

    def numel(self) -> int:
        """Return how many weights it stands for."""
        return self.shape.numel()

    def dim(self) -> int:
        """Return the number of dimensions of the weight."""
        return len(self.shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight, level * absmax rounded once to dtype.

        Args:
            dtype: float32, float16, bfloat16 or float64; by default that of the original weight.
        Returns:
            A new tensor of self.shape.
        Raises:
            DtypeError: if dtype is none of these.
        """
        dtype = dtype or self.dtype
        check_dtype("cannot dequantise to", dtype)
        dense: Tensor
        if self.quant_type == "nf4":
            blocks = (self.block_size, self.nested_block_size)
            dense = operations.run(torch.ops.lora_core.nf4_dequantize, *self.parts, self.shape, dtype, *blocks)
        else:
            given = (self.codes, self.dense_absmax(), self.shape, dtype, self.block_size, self.quant_type)
            dense = operations.run(torch.ops.lora_core.dequantize, *given)
        return dense

    def dense_absmax(self) -> Tensor:
        """Return the scales in float32, as they enter the weights."""
        if not self.double_quant:
            return self.absmax
        _, *scales = self.parts
        dense: Tensor = operations.run(torch.ops.lora_core.absmax_dequantize, *scales, self.nested_block_size)
        return dense

    def to_bitsandbytes(self, prefix: str = "weight") -> dict[str, Tensor]:
        """Return the state dict that bitsandbytes writes for such a weight.

        Args:
            prefix: the key of the packed codes, and what the other keys start with.
        Raises:
            ConfigError: for "int4", which bitsandbytes does not have, or a prefix that is no string.
        """
        return bitsandbytes.write(self, prefix)

    @classmethod
    def from_bitsandbytes(cls, state: Mapping[str, Tensor], prefix: str = "weight") -> "QuantizedWeight":
        """Return the weight that bitsandbytes' state dict describes; it decodes to the same bits.

        Args:
            state: holds prefix and prefix + ".absmax" and so on; other keys are ignored.
            prefix: the key of the packed codes.
        Raises:
            CheckpointError: if keys are missing, sizes disagree, or quant_map is not the type's codebook. Scales that
                another nested map has quantised are read, and held in float32.
            ConfigError: if state is no mapping, or prefix no string.
        """
        return cls(**bitsandbytes.read(state, prefix))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedWeight":
        """Follow device moves and sharing, refuse casts."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype == tensor.dtype:
                return moved
            return tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)
        return self

    # the state dict holds bitsandbytes' keys, the packed codes as "packed"; NF4Linear renames that to its own "weight"

    def __getattr__(self, name: str) -> Any:
        """Find what has a key in the state dict and no attribute: torch.distributed.checkpoint follows every key."""
        if name == bitsandbytes.STATE:
            return _State(self)
        if name in bitsandbytes.MAPS and name in bitsandbytes.keys(self.quant_type, self.double_quant):
            return bitsandbytes.entries(self)[name]
        return super().__getattr__(name)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for key, value in bitsandbytes.entries(self).items():
            destination[prefix + (key or "packed")] = value

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        mine = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        if "packed" not in mine:
            missing_keys.append(prefix + "packed")
            return
        state = {f"weight.{k}": v for k, v in mine.items() if k != "packed"}
        try:
            read = bitsandbytes.read({"weight": mine["packed"], **state}, "weight")
        except CheckpointError as error:
            error_msgs.append(f"{prefix.rstrip('.') or 'weight'}: {error}")
            return
        if read["quant_type"] != self.quant_type:
            error_msgs.append(
                f"{prefix.rstrip('.') or 'weight'}: the checkpoint's weight is {read['quant_type']}, this one "
                f"{self.quant_type}: quantise the model as it was when it was saved"
            )
            return
        if read["shape"] != self.shape:
            error_msgs.append(
                f"{prefix.rstrip('.') or 'weight'}: the checkpoint's weight has shape {tuple(read['shape'])}, this one "
                f"{tuple(self.shape)}"
            )
            return
        assign = local_metadata.get("assign_to_params_buffers", False)
        for key in PARTS:
            self._load_part(key, read.pop(key), assign)
        for key, value in read.items():
            setattr(self, key, value)
        # a state with scales that are quantised by another map is read, and holds them in float32 from then on
        expected = bitsandbytes.keys(self.quant_type, "nested_absmax" in mine)
        unexpected_keys.extend(prefix + k for k in mine if k != "packed" and k not in expected and strict)

    def _load_part(self, key: str, value: Tensor | None, assign: bool) -> None:
        """Take a part that was read: into the memory held already where it fits, as others may share it."""
        held = getattr(self, key)
        if value is None or assign:
            setattr(self, key, value)
        elif held is not None and not held.is_meta and (held.shape, held.dtype) == (value.shape, value.dtype):
            with torch.no_grad():
                held.copy_(value)
        else:
            device = value.device if self.device.type == "meta" else self.device
            setattr(self, key, value.to(device, copy=True))

    def extra_repr(self) -> str:
        return (
            f"shape={tuple(self.shape)}, {self.quant_type}, block_size={self.block_size}, "
            f"double_quant={self.double_quant}, {self.bits_per_parameter:.3f} bits/parameter, dtype={self.dtype}"
        )


class _State:
    """What the text of a weight's state dict is an attribute of, made when it is asked for: a lookup costs nothing."""

    def __init__(self, weight: QuantizedWeight) -> None:
        self._weight = weight

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return bitsandbytes.entries(self._weight)[f"{bitsandbytes.STATE}.{name}"]
        except KeyError:
            raise AttributeError(name) from None
