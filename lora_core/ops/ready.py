"""Whether operands can be taken as they are: most can, and the checks, one by one, take longer to say so."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lora_core.dtypes import FLOATS
from lora_core.ops.checks import LARGEST, autocast_on, inside_functorch
from lora_core.ops.packed import Packed

# subclasses may stand for anything
TENSORS = frozenset({Tensor, torch.nn.Parameter})


def ready(x: Any, weight: Any, bias: Any, lora_a: Any, lora_b: Any, scaling: Any, dropout: Any, seed: Any) -> bool:
    """Say whether the checks of lora_linear, or of nf4_lora_linear, would neither refuse nor convert anything.

    Never says so where they would; where it does not, they have to be asked. Arguments are theirs, and may be anything.
    """
    frozen = weight.codes if type(weight) is Packed else weight
    taken = {type(x), type(frozen), type(lora_a), type(lora_b)} <= TENSORS
    if torch.compiler.is_compiling() or not taken or x.is_nested:
        return False
    shape, device, dtype, low = weight.shape, x.device, x.dtype, lora_a.dtype
    if len(shape) != 2 or 0 in shape:
        return False
    n, k = shape
    return (
        x.shape[-1:] == lora_a.shape[1:] == (k,)
        and lora_b.shape == (n, lora_a.shape[0])
        and dtype in FLOATS
        and low == lora_b.dtype
        and (low == dtype or low == torch.float32)
        and (frozen is not weight or frozen.dtype == dtype)
        and torch.strided == x.layout == frozen.layout == lora_a.layout == lora_b.layout
        and frozen.device == lora_a.device == lora_b.device == device
        and (bias is None or _fits(bias, (n,), dtype, device))
        and type(scaling) is float
        and -LARGEST <= scaling <= LARGEST
        and type(dropout) is float
        and (seed is None or _fits(seed, (1,), torch.int64, device))
        and (dropout == 0 or (0 < dropout < 1 and seed is not None))
        # is_transformed, of which no compiler asks here
        and forward_ad._current_level < 0
        and not inside_functorch()
        and not autocast_on(x)
    )


def alike(*tensors: Any) -> bool:
    """Say whether check_alike would take these, and neither autocast nor a transform has to be thought of."""
    return (
        not torch.compiler.is_compiling()
        and of_one_kind(*tensors)
        and forward_ad._current_level < 0
        and not inside_functorch()
        and not autocast_on(tensors[0])
    )


def of_one_kind(*tensors: Any) -> bool:
    """Say whether these are plain dense tensors of one floating dtype on one device."""
    if not TENSORS.issuperset(map(type, tensors)):
        return False
    dtype, device = tensors[0].dtype, tensors[0].device
    return dtype in FLOATS and all(
        t.dtype == dtype and t.device == device and t.layout == torch.strided and not t.is_nested for t in tensors
    )


def _fits(t: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
    fits = type(t) in TENSORS and t.shape == shape and t.dtype == dtype and t.device == device
    return fits and t.layout == torch.strided
