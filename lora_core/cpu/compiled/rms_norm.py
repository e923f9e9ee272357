"""RMS normalisation and its gradients, row by row."""

from typing import Any

import numpy as np

from lora_core.cpu.compiled.floats import ONE, ZERO, rounded, widened
from lora_core.cpu.compiled.jit import contracted, reordered
from lora_core.cpu.compiled.share import share


@reordered
def _squares(row: np.ndarray) -> Any:
    total = ZERO
    for k in range(row.size):
        total += widened(row[k]) * widened(row[k])
    return total


@reordered
def _inner(grad: np.ndarray, weight: np.ndarray, row: np.ndarray) -> Any:
    total = ZERO
    for k in range(row.size):
        total += widened(grad[k]) * widened(weight[k]) * widened(row[k])
    return total


@contracted
def _forward(
    x: np.ndarray, weight: np.ndarray, eps: float, y: np.ndarray, r: np.ndarray, first: int, last: int
) -> None:
    columns = weight.size
    for m in range(first, last):
        row, out = x[m], y[m]
        r[m] = ONE / np.sqrt(_squares(row) / np.float32(columns) + eps)
        for k in range(columns):
            out[k] = rounded(y, widened(row[k]) * r[m] * widened(weight[k]))


@contracted
def _backward(
    d_y: np.ndarray,
    x: np.ndarray,
    weight: np.ndarray,
    r: np.ndarray,
    d_x: np.ndarray,
    parts: np.ndarray,
    rows: int,
    first: int,
    last: int,
) -> None:
    columns = weight.size
    for m in range(first, last):
        grad, row, out = d_y[m], x[m], d_x[m]
        mean = _inner(grad, weight, row) * r[m] / np.float32(columns)
        for k in range(columns):
            h, n = widened(grad[k]) * widened(weight[k]), widened(row[k]) * r[m]
            out[k] = rounded(d_x, r[m] * (h - n * mean))
        if parts.size:
            part = parts[m // rows]
            for k in range(columns):
                part[k] += widened(grad[k]) * (widened(row[k]) * r[m])


@contracted
def forward(openmp: int, threads: int, counter: np.ndarray, step: int, count: int, *arguments: Any) -> None:
    """Fill ranges of y and r.

    Arguments:
        x, weight: float32, or uint16 for bfloat16, [M, K] and [K].
        eps: float32.
        y, r: as x, and float32 [M].
    """
    share(_forward, openmp, threads, counter, step, count, arguments)


@contracted
def backward(openmp: int, threads: int, counter: np.ndarray, step: int, count: int, *arguments: Any) -> None:
    """Fill ranges of d_x, and add to parts of d_weight.

    Arguments:
        d_y, x, weight: float32, or uint16 for bfloat16, [M, K] twice and [K].
        r: float32, [M].
        d_x: as x.
        parts: float32, zeros, [ceil(M / rows), K]; or empty, where d_weight is not needed.
        rows: of a part; ranges begin at multiples of it.
    """
    share(_backward, openmp, threads, counter, step, count, arguments)
