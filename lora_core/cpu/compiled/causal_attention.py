"""Causal attention and its gradients: the heads of a key one after another, and of their queries some at a time.

Scores of some queries stay in the cache of the thread that makes them until they are used up. Of keys that come after
the last of these queries nothing is computed: about half of all there is.
"""

from typing import Any

import numpy as np

from lora_core.cpu.compiled.floats import ONE, ZERO, half_of_exp, larger
from lora_core.cpu.compiled.jit import contracted, reordered
from lora_core.cpu.compiled.panel import LANES, ROWS, WIDTH, Matrix, multiply
from lora_core.cpu.compiled.share import share

# queries whose scores are made together, and scores that this is to keep them below
QUERIES, SCORES = 64, 2**16


@contracted
def _sizes(tokens: int) -> Any:
    """Return how many queries are taken at a time, and the columns of a matrix with one for each key.

    Those are whole panels, and LANES more: rows that lie a large power of two apart would share few lines of a cache.
    """
    columns = -(-tokens // WIDTH) * WIDTH + LANES
    return min(QUERIES, max(SCORES // columns // ROWS, 1) * ROWS), columns


@contracted
def _transpose(x: np.ndarray, out: np.ndarray) -> None:
    """Write the rows of x to the first columns of out."""
    tokens, size = x.shape
    for begin in range(0, tokens, LANES):
        end = min(begin + LANES, tokens)
        some = x[begin:end]
        for d in range(size):
            row = out[d, begin:end]
            for t in range(row.size):
                row[t] = some[t, d]


@contracted
def _largest(row: np.ndarray) -> Any:
    largest = row[0]
    for j in range(1, row.size):
        largest = larger(largest, row[j])
    return largest


@reordered
def _exponentials(row: np.ndarray, largest: Any, scale: Any) -> Any:
    """Turn scores into halves of exp(scale * (score - largest)), and return their sum."""
    total = ZERO
    for j in range(row.size):
        row[j] = half_of_exp((row[j] - largest) * scale)
        total += row[j]
    return total


@reordered
def _inner(a: np.ndarray, b: np.ndarray) -> Any:
    total = ZERO
    for j in range(a.size):
        total += a[j] * b[j]
    return total


@contracted
def _clear(row: np.ndarray) -> None:
    for j in range(row.size):
        row[j] = ZERO


@contracted
def _unnormalised(row: np.ndarray, seen: int, scale: Any) -> Any:
    """Turn a query's scores into what its probabilities are, times a number, and return that of which it is 1 over.

    Of keys after those that it sees they are 0.
    """
    part = row[:seen]
    total = _exponentials(part, _largest(part), scale)
    _clear(row[seen:])
    return ONE / total


@contracted
def _gradient(row: np.ndarray, grad: np.ndarray, seen: int, scale: Any) -> None:
    """Turn a query's scores into probabilities, and the gradient of those into that of its products with keys."""
    inverse = _unnormalised(row, seen, scale)
    p, g = row[:seen], grad[:seen]
    mean = _inner(p, g) * inverse
    for j in range(p.size):
        p[j] *= inverse
        g[j] = p[j] * ((g[j] - mean) * scale)
    _clear(grad[seen:])


@contracted
def _forward(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: Any, o: np.ndarray, first: int, last: int) -> None:
    heads, tokens, width = q.shape[1:]
    groups, size = v.shape[2:]
    queries, columns = _sizes(tokens)
    # zeros for keys beyond the last, with which whole panels are filled
    keys, values = np.zeros((width, columns), np.float32), np.empty((tokens, size), np.float32)
    scores, inverses = np.empty((queries, columns), np.float32), np.empty(queries, np.float32)
    for task in range(first, last):
        b, g = task // groups, task % groups
        _transpose(k[b, g], keys)
        for t in range(tokens):
            values[t] = v[b, t, g]
        for h in range(g * (heads // groups), (g + 1) * (heads // groups)):
            for start in range(0, tokens, queries):
                end = min(start + queries, tokens)
                rows = end - start
                asking = Matrix(q, ((b * heads + h) * tokens + start) * width, width, 1)
                made = Matrix(scores, 0, columns, 1)
                out = Matrix(o, ((b * tokens + start) * heads + h) * size, heads * size, 1)
                multiply(asking, Matrix(keys, 0, columns, 1), made, rows, -(-end // WIDTH) * WIDTH, width, False)
                for i in range(rows):
                    inverses[i] = _unnormalised(scores[i, :end], start + i + 1, scale)
                multiply(made, Matrix(values, 0, size, 1), out, rows, size, end, False)
                for i in range(rows):
                    line = o[b, start + i, h]
                    for d in range(size):
                        line[d] *= inverses[i]


@contracted
def _backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    scale: Any,
    d_o: np.ndarray,
    d_q: np.ndarray,
    d_k: np.ndarray,
    d_v: np.ndarray,
    first: int,
    last: int,
) -> None:
    heads, tokens, width = q.shape[1:]
    groups, size = v.shape[2:]
    queries, columns = _sizes(tokens)
    keys, values = np.zeros((width, columns), np.float32), np.zeros((size, columns), np.float32)
    scores, grads = np.empty((queries, columns), np.float32), np.empty((queries, columns), np.float32)
    of_keys, of_values = np.empty((tokens, width), np.float32), np.empty((tokens, size), np.float32)
    given = np.empty((queries, size), np.float32)
    for task in range(first, last):
        b, g = task // groups, task % groups
        _transpose(k[b, g], keys)
        _transpose(v[b, :, g], values)
        of_keys[:] = ZERO
        of_values[:] = ZERO
        for h in range(g * (heads // groups), (g + 1) * (heads // groups)):
            for start in range(0, tokens, queries):
                end = min(start + queries, tokens)
                rows, panels = end - start, -(-end // WIDTH) * WIDTH
                for i in range(rows):
                    given[i] = d_o[b, start + i, h]
                asking = Matrix(q, ((b * heads + h) * tokens + start) * width, width, 1)
                out = Matrix(d_q, ((b * tokens + start) * heads + h) * width, heads * width, 1)
                arrived, p, s = Matrix(given, 0, size, 1), Matrix(scores, 0, columns, 1), Matrix(grads, 0, columns, 1)
                multiply(asking, Matrix(keys, 0, columns, 1), p, rows, panels, width, False)
                multiply(arrived, Matrix(values, 0, columns, 1), s, rows, panels, size, False)
                for i in range(rows):
                    _gradient(scores[i, :end], grads[i, :end], start + i + 1, scale)
                multiply(s, Matrix(k, (b * groups + g) * tokens * width, width, 1), out, rows, width, end, False)
                p, s = Matrix(scores, 0, 1, columns), Matrix(grads, 0, 1, columns)
                multiply(p, arrived, Matrix(of_values, 0, size, 1), end, size, rows, True)
                multiply(s, asking, Matrix(of_keys, 0, width, 1), end, width, rows, True)
        for t in range(tokens):
            d_k[b, t, g] = of_keys[t]
            d_v[b, t, g] = of_values[t]


@contracted
def forward(openmp: int, threads: int, counter: np.ndarray, step: int, count: int, *arguments: Any) -> None:
    """Write o for ranges of the keys' heads, of which all in a batch are counted.

    Arguments:
        q: float32 [B, H, T, D], D a multiple of LANES.
        k: float32 [B, G, T, D], H a multiple of G.
        v: float32 [B, T, G, E], E a multiple of LANES.
        scale: float32, above 0.
        o: float32 [B, T, H, E].
    """
    share(_forward, openmp, threads, counter, step, count, arguments)


@contracted
def backward(openmp: int, threads: int, counter: np.ndarray, step: int, count: int, *arguments: Any) -> None:
    """Write d_q, d_k and d_v for ranges of the keys' heads.

    Arguments:
        q, k, v, scale: as in forward.
        d_o: float32 [B, T, H, E].
        d_q, d_k, d_v: float32 [B, T, H, D], [B, T, G, D] and [B, T, G, E].
    """
    share(_backward, openmp, threads, counter, step, count, arguments)
