"""lora_core::causal_attention on the CPU, by compiled loops where Numba is installed."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_core.cpu import compiled
from lora_core.cpu.chunks import share
from lora_core.ops.causal_attention import backward_op, better, op
from lora_core.ops.eager import register
from lora_core.reference import causal_attention as reference

# what threads have to do, of what they could in that time: they share the heads of keys, and PyTorch's also tokens
BUSY = 0.8


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return what the reference returns, up to rounding."""
    loops = loops_for(q, v, scale)
    if loops is None:
        return reference.causal_attention(q, k, v, scale)
    b, h, t, _ = q.shape
    o = torch.empty(b, t, h, v.shape[3], dtype=q.dtype)
    _share(loops.forward, q, k, v.transpose(1, 2), np.float32(scale), o)
    return o.transpose(1, 2)


def causal_attention_backward(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the reference returns, up to rounding."""
    loops = loops_for(q, v, scale)
    if loops is None:
        return reference.backward(d_o, q, k, v, scale)
    d_q, d_k, d_v = (torch.empty_like(t.transpose(1, 2), memory_format=torch.contiguous_format) for t in (q, k, v))
    _share(loops.backward, q, k, v.transpose(1, 2), np.float32(scale), d_o.transpose(1, 2), d_q, d_k, d_v)
    return d_q.transpose(1, 2), d_k.transpose(1, 2), d_v.transpose(1, 2)


def loops_for(q: Tensor, v: Tensor, scale: float) -> Any:
    """Return the compiled loops, or None for what they do not take: half precision, odd heads, no scale above 0."""
    b, h, t, d = q.shape
    if q.dtype != torch.float32 or not (q.numel() and scale > 0):
        return None
    # loading them is worth it for so many scores
    loops = compiled.load_for("causal_attention", b * h * t * t)
    return loops if loops is not None and d % loops.LANES == v.shape[3] % loops.LANES == 0 else None


def is_better(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Say whether the loops take these and all threads are busy."""
    threads, tasks = torch.get_num_threads(), k.shape[0] * k.shape[1]
    return tasks >= BUSY * threads * -(-tasks // threads) and loops_for(q, v, scale) is not None


def _share(loop: Any, q: Tensor, k: Tensor, *arguments: Any) -> None:
    arrays = (a.contiguous().numpy(force=True) if isinstance(a, Tensor) else a for a in (q, k, *arguments))
    share(loop, k.shape[0] * k.shape[1], 1, 1, *arrays)


register(op, "cpu", causal_attention)
register(backward_op, "cpu", causal_attention_backward)
better["cpu"] = is_better
