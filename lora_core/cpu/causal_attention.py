"""lora_core::causal_attention on the CPU, by compiled loops where Numba is installed."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_core.cpu import compiled
from lora_core.cpu.chunks import share
from lora_core.ops.causal_attention import backward_op, better, empty_by_token, op
from lora_core.ops.eager import register
from lora_core.reference import causal_attention as reference

# the least share of their time in which threads have something to do: they take heads of keys, one after another, and
# may wait for the last, where PyTorch's share tokens, too; the loops are a quarter faster, or more, on threads as busy
BUSY = 0.8

# tokens, and elements of a key and a value together, from which on the loops are faster: of 128 tokens and heads of 64
# forward and backward took 0.87 to 1.04 times what PyTorch's took, of 182 0.72 to 0.81, of 64 tokens 1.4; with heads of
# 32 0.78 to 1.1 (one thread and two of an Intel Xeon, family 6 model 207)
LONG, WIDE = 160, 128
LARGEST = torch.finfo(torch.float32).max


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return what the reference returns, up to rounding."""
    loops = loops_for(q, v, scale)
    if loops is None:
        return reference.causal_attention(q, k, v, scale)
    o = empty_by_token(q, v.shape[3])
    _share(loops, loops.forward, q, k, v, np.float32(scale), o)
    return o


def causal_attention_backward(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the reference returns, up to rounding."""
    loops = loops_for(q, v, scale)
    if loops is None:
        return reference.backward(d_o, q, k, v, scale)
    d_q, d_k, d_v = (empty_by_token(t, t.shape[3]) for t in (q, k, v))
    _share(loops, loops.backward, q, k, v, np.float32(scale), d_o, d_q, d_k, d_v)
    return d_q, d_k, d_v


def loops_for(q: Tensor, v: Tensor, scale: float) -> Any:
    """Return the compiled loops, or None for what they do not take: half precision, odd heads, no scale above 0."""
    b, h, t, d = q.shape
    if q.dtype != torch.float32 or not q.numel() or not 0 < scale <= LARGEST:
        return None
    # loading them is worth it for so many scores
    loops = compiled.load_for("causal_attention", b * h * t * t)
    return loops if loops is not None and d % loops.LANES == v.shape[3] % loops.LANES == 0 else None


def is_better(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Say whether the loops take these, have enough to do, and keep all threads busy.

    That depends on the operands alone, and not on whether the loops are loaded yet, as so many scores load them: what
    is computed once more for a backward has to be computed the same way.
    """
    threads, tasks = torch.get_num_threads(), k.shape[0] * k.shape[1]
    enough = q.shape[:3].numel() * q.shape[2] >= compiled.WORTHWHILE
    fit = enough and q.shape[2] >= LONG and q.shape[3] + v.shape[3] >= WIDE
    return fit and tasks >= BUSY * threads * -(-tasks // threads) and loops_for(q, v, scale) is not None


def _share(loops: Any, loop: Any, q: Tensor, k: Tensor, v: Tensor, scale: Any, *rest: Tensor) -> None:
    b, h, t, d = q.shape
    g, e = v.shape[1], v.shape[3]
    given = [_heads(loops, x) for x in (q, k, v, *rest)]
    share(loop, b * g, 1, 1, loops.Sizes(h, g, t, d, e), *given[:3], scale, *given[3:])


def _heads(loops: Any, x: Tensor) -> Any:
    """Return a tensor [B, H, T, N] for the loops, where it lies if they can read it there."""
    x = x if x.stride(3) == 1 else x.contiguous()
    strides = x.stride()
    length = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
    return loops.Heads(x.as_strided((length,), (1,)).numpy(force=True), *strides[:3])


register(op, "cpu", causal_attention)
register(backward_op, "cpu", causal_attention_backward)
better["cpu"] = is_better
