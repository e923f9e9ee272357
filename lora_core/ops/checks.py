"""What the ops check before they run, and how autocast reaches them."""

import contextlib
import numbers
import sys

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lora_core.dtypes import FLOATS
from lora_core.errors import ConfigError, DeviceError, DtypeError, ShapeError

LARGEST = sys.float_info.max
# asked at every call: found once
_on_anywhere, _innermost_transform = torch._C._is_any_autocast_enabled, torch._C._functorch.peek_interpreter_stack


def check_tensors(op: str, tensors: dict[str, object]) -> None:
    """Raise DtypeError unless all are dense tensors."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise DtypeError(f"{op}: {name} is a {type(tensor).__name__}; want a torch.Tensor")
        _check_layout(op, name, tensor)


def _check_layout(op: str, name: str, tensor: Tensor) -> None:
    if tensor.is_nested:
        raise DtypeError(f"{op}: {name} is nested; want a dense tensor, e.g. {name}.to_padded_tensor(0.0)")
    if tensor.layout != torch.strided:
        raise DtypeError(f"{op}: {name} is of layout {tensor.layout}; want a dense tensor, e.g. {name}.to_dense()")


def check_kinds(op: str, tensors: dict[str, object], bias: object, scaling: object) -> float:
    """Return scaling as a float; raise DtypeError unless all are tensors, and ConfigError unless it is a number."""
    check_tensors(op, tensors)
    if bias is not None and not isinstance(bias, Tensor):
        raise DtypeError(f"{op}: bias is a {type(bias).__name__}; want a torch.Tensor or None")
    if isinstance(bias, Tensor):
        _check_layout(op, "bias", bias)
    number = plain_number(scaling)
    # NaN is within no bounds
    if not isinstance(number, (int, float)) or not -LARGEST <= number <= LARGEST:
        raise ConfigError(f"{op}: scaling is {scaling!r}; want a finite number, alpha / r")
    return number


def plain_number(number: object) -> object:
    """Return NumPy's numbers and fractions as floats; a SymFloat that torch.compile traces stays as it is."""
    return float(number) if isinstance(number, numbers.Real) and not isinstance(number, (int, float)) else number


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


def check_sides(op: str, weight: tuple[int, ...]) -> None:
    """Raise ShapeError if a weight [N, K] has an empty side; rows of x may be none, features not."""
    if 0 in weight:
        raise ShapeError(f"{op}: weight {tuple(weight)} has a side of 0; want N and K of at least 1")


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
        odd = "lora_a and lora_b with .float()" if set(dtypes.values()) == {dtype} else "x with x.to(weight.dtype)"
        raise DtypeError(
            f"{op}: want {', '.join(dtypes)} of one floating dtype, and lora_a, lora_b of that dtype or of "
            f"torch.float32; got {got}: cast {odd}, or run under torch.autocast"
        )


def check_alike(op: str, tensors: dict[str, object]) -> None:
    """Raise DtypeError or DeviceError unless all are dense tensors of one floating dtype on one device."""
    check_tensors(op, tensors)
    alike = {name: t for name, t in tensors.items() if isinstance(t, Tensor)}
    dtypes = {t.dtype for t in alike.values()}
    if len(dtypes) > 1 or not dtypes.issubset(FLOATS):
        got = ", ".join(f"{name} {t.dtype}" for name, t in alike.items())
        raise DtypeError(f"{op}: want {', '.join(alike)} of one floating dtype; got {got}: cast them with .to(dtype)")
    check_devices(op, {**alike})


def check_devices(op: str, tensors: dict[str, Tensor | None]) -> None:
    """Raise DeviceError unless all tensors are on one device."""
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        got = ", ".join(f"{name} on {d}" for name, d in devices.items())
        raise DeviceError(f"{op}: want all tensors on one device; got {got}: move them with .to(device)")


def check_dropout(op: str, dropout: object, seed: object) -> float:
    """Return dropout as a float; raise ConfigError unless it is a probability below 1, with a seed where positive."""
    number = plain_number(dropout)
    if not isinstance(number, (int, float)) or not 0 <= number < 1:
        raise ConfigError(f"{op}: dropout is {dropout!r}; want a probability in [0, 1)")
    if seed is not None and not isinstance(seed, Tensor):
        raise ConfigError(f"{op}: want a seed that is an int64 tensor of one element, or None; got {seed!r}")
    if isinstance(seed, Tensor):
        _check_layout(op, "seed", seed)
    if number and (not isinstance(seed, Tensor) or seed.numel() != 1 or seed.dtype != torch.int64):
        got = f"{seed.dtype} of shape {tuple(seed.shape)}" if isinstance(seed, Tensor) else repr(seed)
        raise ConfigError(f"{op}: dropout {dropout} needs a seed, an int64 tensor of one element; got {got}")
    return number


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast, if it is on for x's device, wants linear layers to compute in."""
    if x.dtype != torch.float64 and x.is_floating_point() and autocast_on(x):
        return torch.get_autocast_dtype(x.device.type)
    return None


def autocast_on(x: Tensor) -> bool:
    """Say whether autocast is on for x's device; the meta device has none."""
    # mostly it is on nowhere: one question in place of three
    if not torch.compiler.is_compiling() and not _on_anywhere():
        return False
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def outside_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context in which autocast is off for x's device: a backward computes in the dtypes of its forward."""
    return torch.autocast(x.device.type, enabled=False) if autocast_on(x) else contextlib.nullcontext()


def inside_functorch() -> bool:
    """Say whether a transform of torch.func is at work, whose tensors have no memory of their own."""
    return _innermost_transform() is not None


def is_transformed() -> bool:
    """Say whether torch.func or forward mode differentiates or maps: the plain formula then runs, which they know.

    A compiler that traces can be asked about forward mode alone.
    """
    return forward_ad._current_level >= 0 or (not torch.compiler.is_compiling() and inside_functorch())
