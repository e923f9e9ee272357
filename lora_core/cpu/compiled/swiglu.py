"""SwiGLU and its gradients, element by element."""

from typing import Any

import numpy as np

from lora_core.cpu.compiled.floats import ONE, logistic, rounded, widened
from lora_core.cpu.compiled.jit import contracted
from lora_core.cpu.compiled.share import share


@contracted
def _forward(gate: np.ndarray, up: np.ndarray, y: np.ndarray, first: int, last: int) -> None:
    # from 0 on: an index that may be negative is looked up element by element
    gates, ups, out = gate[first:last], up[first:last], y[first:last]
    for i in range(out.size):
        g = widened(gates[i])
        out[i] = rounded(y, g * logistic(g) * widened(ups[i]))


@contracted
def _backward(
    d_y: np.ndarray, gate: np.ndarray, up: np.ndarray, d_gate: np.ndarray, d_up: np.ndarray, first: int, last: int
) -> None:
    grads, gates, ups = d_y[first:last], gate[first:last], up[first:last]
    of_gate, of_up = d_gate[first:last], d_up[first:last]
    for i in range(grads.size):
        d, g = widened(grads[i]), widened(gates[i])
        sigma = logistic(g)
        of_gate[i] = rounded(d_gate, d * widened(ups[i]) * (sigma * (ONE + g * (ONE - sigma))))
        of_up[i] = rounded(d_up, d * (g * sigma))


@contracted
def forward(openmp: int, threads: int, counter: np.ndarray, step: int, count: int, *arguments: Any) -> None:
    """Fill ranges of y.

    Arguments:
        gate, up, y: float32, or uint16 for bfloat16, [count].
    """
    share(_forward, openmp, threads, counter, step, count, arguments)


@contracted
def backward(openmp: int, threads: int, counter: np.ndarray, step: int, count: int, *arguments: Any) -> None:
    """Fill ranges of both gradients.

    Arguments:
        d_y, gate, up, d_gate, d_up: float32, or uint16 for bfloat16, [count].
    """
    share(_backward, openmp, threads, counter, step, count, arguments)
