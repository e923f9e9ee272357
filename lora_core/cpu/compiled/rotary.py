"""Rotary position embedding, token by token; its gradient is the same map, transposed."""

from typing import Any

import numpy as np

from lora_core.cpu.compiled.floats import rounded, widened
from lora_core.cpu.compiled.jit import contracted
from lora_core.cpu.compiled.share import share


@contracted
def _forward(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, y: np.ndarray, first: int, last: int) -> None:
    tokens, heads, half = x.shape[1], x.shape[2], x.shape[3] // 2
    for token in range(first, last):
        b, t = token // tokens, token % tokens
        c, s = cos[b if len(cos) > 1 else 0, t], sin[b if len(sin) > 1 else 0, t]
        for h in range(heads):
            head, out = x[b, t, h], y[b, h, t]
            for i in range(half):
                x1, x2 = widened(head[i]), widened(head[half + i])
                out[i] = rounded(y, x1 * widened(c[i]) - x2 * widened(s[i]))
                out[half + i] = rounded(y, x2 * widened(c[half + i]) + x1 * widened(s[half + i]))


@contracted
def _backward(d_y: np.ndarray, cos: np.ndarray, sin: np.ndarray, d_x: np.ndarray, first: int, last: int) -> None:
    tokens, heads, half = d_y.shape[1], d_y.shape[2], d_y.shape[3] // 2
    for token in range(first, last):
        b, t = token // tokens, token % tokens
        c, s = cos[b if len(cos) > 1 else 0, t], sin[b if len(sin) > 1 else 0, t]
        for h in range(heads):
            head, out = d_y[b, t, h], d_x[b, t, h]
            for i in range(half):
                g1, g2 = widened(head[i]), widened(head[half + i])
                out[i] = rounded(d_x, g1 * widened(c[i]) + g2 * widened(s[half + i]))
                out[half + i] = rounded(d_x, g2 * widened(c[half + i]) - g1 * widened(s[i]))


@contracted
def forward(openmp: int, threads: int, counter: np.ndarray, step: int, count: int, *arguments: Any) -> None:
    """Fill ranges of y, of B T tokens.

    Arguments:
        x: float32, or uint16 for bfloat16, [B, T, H, D].
        cos, sin: as x, [B, T, D] or [1, T, D].
        y: as x, [B, H, T, D].
    """
    share(_forward, openmp, threads, counter, step, count, arguments)


@contracted
def backward(openmp: int, threads: int, counter: np.ndarray, step: int, count: int, *arguments: Any) -> None:
    """Fill ranges of d_x, of B T tokens.

    Arguments:
        d_y: as x in forward.
        cos, sin: as in forward.
        d_x: as d_y.
    """
    share(_backward, openmp, threads, counter, step, count, arguments)
