"""The operations lora_core::dora_norm and lora_core::nf4_dora_norm.

The mathematics stands in lora_core/reference/dora.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_core.errors import ConfigError
from lora_core.ops.checks import check_devices, check_dtypes, check_kinds, check_shapes, outside_autocast
from lora_core.ops.packed import Packed
from lora_core.quant import QuantizedWeight
from lora_core.quant.parts import check_dtype
from lora_core.reference import dora as reference


@torch.library.custom_op("lora_core::dora_norm", mutates_args=())
def op(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    return reference.dora_norm(weight, lora_a, lora_b, scaling)


@op.register_fake
def _(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    wide = torch.promote_types(lora_a.dtype, torch.float32)
    return weight.new_empty(weight.shape[0], dtype=wide)


@torch.library.custom_op("lora_core::nf4_dora_norm", mutates_args=())
def nf4_op(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    block_size: int,
    nested_block_size: int,
    dtype: torch.dtype,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
) -> Tensor:
    w = Packed(codes, absmax, nested_absmax, nested_offset, shape, block_size, nested_block_size)
    return reference.dora_norm(w.dense(dtype), lora_a, lora_b, scaling)


@nf4_op.register_fake
def _(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    block_size: int,
    nested_block_size: int,
    dtype: torch.dtype,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
) -> Tensor:
    wide = torch.promote_types(lora_a.dtype, torch.float32)
    return codes.new_empty(shape[0], dtype=wide)


def dora_norm(
    weight: Tensor | QuantizedWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return |W + s B A| row by row, without forming B A.

    Not differentiable: DoRA's gradient takes the norm for a constant. Computed in the dtypes given, also under
    autocast.

    Args:
        weight: W, float32, float16, bfloat16 or float64 of shape [N, K], any strides; or an NF4 QuantizedWeight.
        lora_a: A, dtype of W or float32, shape [R, K].
        lora_b: B, dtype of lora_a, shape [N, R].
        scaling: s, alpha / r.
        dtype: what an NF4 weight is rounded to, as its matrix product has it; by default that of lora_a.
    Returns:
        Shape [N], float32, or float64 where lora_a is.
    Raises:
        ShapeError, DtypeError, DeviceError: if the operands do not fit together.
        ConfigError: if weight is quantised otherwise than as NF4, or scaling is no finite number.
    Source: Liu et al. 2024 (arXiv 2402.09353), eq. 5 and section 4.3.
    """
    pair: dict[str, object] = {"lora_a": lora_a, "lora_b": lora_b}
    dense = not isinstance(weight, QuantizedWeight)
    scaling = check_kinds("dora_norm", {"weight": weight, **pair} if dense else pair, None, scaling)
    lora_a, lora_b = lora_a.detach(), lora_b.detach()
    if not isinstance(weight, QuantizedWeight):
        _check(weight, weight, lora_a, lora_b)
        with outside_autocast(lora_a):
            norm: Tensor = op(weight.detach(), lora_a, lora_b, scaling)
        return norm
    if weight.quant_type != "nf4":
        raise ConfigError(f"dora_norm: quant_type is {weight.quant_type!r}; want 'nf4', or weight.dequantize()")
    dtype = dtype or lora_a.dtype
    check_dtype("dora_norm: dtype is", dtype)
    _check(torch.empty(weight.shape, dtype=dtype, device="meta"), weight.codes, lora_a, lora_b)
    with outside_autocast(lora_a):
        nf4_norm: Tensor = nf4_op(*Packed.of(weight), dtype, lora_a, lora_b, scaling)
    return nf4_norm


def _check(like: Tensor, held: Tensor, lora_a: Tensor, lora_b: Tensor) -> None:
    """Raise unless a weight of this shape and dtype, held by a tensor on its device, fits A and B."""
    check_shapes("dora_norm", like, tuple(like.shape), None, lora_a, lora_b)
    check_dtypes("dora_norm", {"weight": like}, lora_a, lora_b)
    check_devices("dora_norm", {"weight": held, "lora_a": lora_a, "lora_b": lora_b})
