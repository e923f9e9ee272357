"""What the ops check before they run, and how autocast reaches them."""

import torch
from torch import Tensor

from lora_core.errors import ConfigError, DeviceError, DtypeError, ShapeError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_kinds(op: str, tensors: dict[str, object], scaling: object) -> None:
    """Raise DtypeError unless all are tensors, and ConfigError unless scaling is a number."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise DtypeError(f"{op}: {name} is a {type(tensor).__name__}; want a torch.Tensor")
    if not isinstance(scaling, (int, float)):
        raise ConfigError(f"{op}: scaling is {scaling!r}; want a number, alpha / r")


def check_shapes(
    op: str, x: Tensor, weight: tuple[int, ...], bias: Tensor | None, lora_a: Tensor, lora_b: Tensor
) -> None:
    """Raise ShapeError unless x [..., K], weight [N, K], bias [N], lora_a [R, K] and lora_b [N, R] fit together."""
    fits = (
        x.dim() >= 1
        and len(weight) == 2
        and lora_a.dim() == lora_b.dim() == 2
        and x.shape[-1] == weight[1] == lora_a.shape[1]
        and lora_b.shape == (weight[0], lora_a.shape[0])
        and (bias is None or bias.shape == (weight[0],))
    )
    if not fits:
        raise ShapeError(
            f"{op}: want x [..., K], weight [N, K], bias [N], lora_a [R, K], lora_b [N, R]; got x {tuple(x.shape)}, "
            f"weight {tuple(weight)}, bias {None if bias is None else tuple(bias.shape)}, "
            f"lora_a {tuple(lora_a.shape)}, lora_b {tuple(lora_b.shape)}: {_misfit(x, weight, bias, lora_a, lora_b)}"
        )


def _misfit(x: Tensor, weight: tuple[int, ...], bias: Tensor | None, lora_a: Tensor, lora_b: Tensor) -> str:
    """Return which operand does not fit, and what would."""
    if len(weight) != 2:
        return f"weight has {len(weight)} dimensions, want 2"
    n, k = weight
    if x.dim() < 1 or x.shape[-1] != k:
        return f"the last dimension of x has to be that of weight, {k}"
    if bias is not None and bias.shape != (n,):
        return f"bias has to be [{n}], one for each row of weight"
    if lora_a.dim() != 2 or lora_a.shape[1] != k:
        return f"lora_a has to be [R, {k}]; pass lora_a.T if it is stored the other way round"
    return f"lora_b has to be [{n}, {lora_a.shape[0]}]; pass lora_b.T if it is stored the other way round"


def check_dtypes(op: str, compute: dict[str, Tensor | None], lora_a: Tensor, lora_b: Tensor) -> None:
    """Raise DtypeError unless the compute tensors share a floating dtype, and A and B that one or float32."""
    dtypes = {name: t.dtype for name, t in compute.items() if t is not None}
    dtype = next(iter(dtypes.values()))
    low = lora_a.dtype
    if (
        dtype not in FLOATS
        or set(dtypes.values()) != {dtype}
        or low != lora_b.dtype
        or low not in (dtype, torch.float32)
    ):
        got = ", ".join(f"{name} {d}" for name, d in {**dtypes, "lora_a": low, "lora_b": lora_b.dtype}.items())
        raise DtypeError(
            f"{op}: want {', '.join(dtypes)} of one floating dtype, and lora_a, lora_b of that dtype or of "
            f"torch.float32; got {got}: cast x with x.to(weight.dtype), or run under torch.autocast"
        )


def check_devices(op: str, tensors: dict[str, Tensor | None]) -> None:
    """Raise DeviceError unless all tensors are on one device."""
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        got = ", ".join(f"{name} on {d}" for name, d in devices.items())
        raise DeviceError(f"{op}: want all tensors on one device; got {got}: move them with .to(device)")


def check_dropout(op: str, dropout: float, seed: Tensor | None) -> None:
    """Raise ConfigError unless dropout is a probability below 1, with a seed where it is positive."""
    if not 0 <= dropout < 1:
        raise ConfigError(f"{op}: dropout is {dropout}; want a probability in [0, 1)")
    if dropout and (seed is None or seed.numel() != 1 or seed.dtype != torch.int64):
        got = "None" if seed is None else f"{seed.dtype} of shape {tuple(seed.shape)}"
        raise ConfigError(f"{op}: dropout {dropout} needs a seed, an int64 tensor of one element; got {got}")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast, if it is on for x's device, wants linear layers to compute in."""
    if x.dtype != torch.float64 and autocast_on(x):
        return torch.get_autocast_dtype(x.device.type)
    return None


def autocast_on(x: Tensor) -> bool:
    """Say whether autocast is on for x's device; the meta device has none."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)
