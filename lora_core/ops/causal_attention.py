"""The operations lora_core::causal_attention and lora_core::causal_attention_backward.

The mathematics stands in lora_core/reference/causal_attention.py.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.errors import ConfigError, ShapeError
from lora_core.ops.checks import LARGEST, check_alike, is_transformed, outside_autocast, plain_number
from lora_core.ops.eager import differentiable, gradients, without_view
from lora_core.ops.ready import alike
from lora_core.reference import causal_attention as reference

# types of devices where the operation runs; PyTorch's attention is fused on others
OWN = ("cpu", "meta")
# says for a type of device whether q, k, v and the scale are better left to this library than to PyTorch's attention
better: dict[str, Callable[[Tensor, Tensor, Tensor, float], bool]] = {}


@torch.library.custom_op("lora_core::causal_attention", mutates_args=())
def op(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return without_view(reference.causal_attention(q, k, v, scale))


@torch.library.custom_op("lora_core::causal_attention_backward", mutates_args=())
def backward_op(d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return reference.backward(d_o, q, k, v, scale)


@op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return empty_by_token(q, v.shape[-1])


@backward_op.register_fake
def _(d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return empty_by_token(q, q.shape[-1]), empty_by_token(k, k.shape[-1]), empty_by_token(v, v.shape[-1])


def empty_by_token(like: Tensor, size: int) -> Tensor:
    """Return an uninitialised tensor [B, H, T, size] for one like [B, H, T, any], token by token in memory."""
    b, h, t, _ = like.shape
    return like.new_empty(b, t, h, size).transpose(1, 2)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, d_o: Tensor):  # type: ignore[no-untyped-def]
    return *gradients(backward_op, d_o, *ctx.saved_tensors, ctx.scale), None


_run = differentiable(op, _save, _backward)


def fit_together(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Say whether causal_attention takes tensors of these shapes."""
    return (
        q.dim() == k.dim() == v.dim() == 4
        and q.shape[0] == k.shape[0]
        and q.shape[2:] == k.shape[2:]
        and k.shape[:3] == v.shape[:3]
        and 0 < k.shape[1] <= q.shape[1]
        and q.shape[1] % k.shape[1] == 0
        and q.shape[3] > 0
        and v.shape[3] > 0
    )


def is_better(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Say whether causal_attention runs these, which it takes, by something faster than PyTorch's attention."""
    found = better.get(q.device.type)
    return found is not None and found(q, k, v, scale)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Return softmax(scale q k^T) v, head by head, where every token sees itself and those before it.

    Differentiable, also twice, in q, k and v, which are all that is kept for it. Inside torch.func's transforms and
    under forward mode the plain formula runs. Computed in float32, or in float64 where the operands are, and rounded
    once; also under autocast. On a CPU the formula runs, with T^2 numbers a head, where compiled loops do not take the
    operands: without Numba, in another dtype than float32, and where D or E is no whole number of vectors.

    On other devices than the CPU PyTorch's scaled_dot_product_attention runs, which is fused there: what it rounds on
    the way, the strides of its result and whether it has a second derivative are PyTorch's.

    Args:
        q: float32, float16, bfloat16 or float64 of shape [B, H, T, D], any strides: batch, heads, tokens, and elements
            of a head, one at least.
        k: dtype of q, shape [B, G, T, D], H a multiple of G: query head h takes key head h // (H / G).
        v: dtype of q, shape [B, G, T, E], E at least 1.
        scale: what products of queries and keys are multiplied by; by default 1 / sqrt(D).
    Returns:
        Shape [B, H, T, E], dtype of q, token by token, as a projection reads it: its transpose(1, 2) is contiguous.
    Raises:
        ShapeError, DtypeError, DeviceError: if the operands do not fit together.
        ConfigError: if scale is neither None nor a finite number.
    Source: Vaswani et al. 2017 (arXiv 1706.03762), eq. 1, with a mask; Ainslie et al. 2023 (arXiv 2305.13245), section
    2.2, for heads that share keys; Dao et al. 2022 (arXiv 2205.14135), section 3.1, for keeping no softmax.
    """
    plain = alike(q, k, v)
    if not plain:
        check_alike("causal_attention", {"q": q, "k": k, "v": v})
    if not fit_together(q, k, v):
        raise ShapeError(
            "causal_attention: want q [B, H, T, D], k [B, G, T, D] and v [B, G, T, E], H a multiple of G, D and E at "
            f"least 1; got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}{_misfit(q, k, v)}"
        )
    number = q.shape[-1] ** -0.5 if scale is None else plain_number(scale)
    # NaN is within no bounds
    if not isinstance(number, (int, float)) or not -LARGEST <= number <= LARGEST:
        raise ConfigError(f"causal_attention: scale is {scale!r}; want a finite number, or None for 1 / sqrt(D)")
    scale = float(number)
    if plain and q.device.type in OWN:
        o: Tensor = _run(q, k, v, scale)
        return o
    with outside_autocast(q):
        return _attend(q, k, v, scale)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    if is_transformed():
        return reference.causal_attention(q, k, v, scale)
    if q.device.type not in OWN:
        shared = q.shape[1] != k.shape[1]
        if scale <= 0:
            # a fused one may multiply the infinities of its mask by the scale
            q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=shared)
    o: Tensor = _run(q, k, v, scale)
    return o


def _misfit(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Return what to do where one can tell."""
    if q.dim() == k.dim() == 4 and q.shape[2] < k.shape[2]:
        return ": keys of tokens without a query want torch's scaled_dot_product_attention, with a mask"
    if q.dim() == k.dim() == v.dim() == 3:
        return ": pass them with [None], a batch of one"
    return ""
