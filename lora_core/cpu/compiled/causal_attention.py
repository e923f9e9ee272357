"""Causal attention and its gradients: the heads of a key one after another, and of their queries some at a time.

Scores of some queries stay in the cache of the thread that makes them until they are used up. Of keys that come after
the last of these queries nothing is computed: about half of all there is.
"""

from typing import Any, NamedTuple

import numpy as np

from lora_core.cpu.compiled.floats import ONE, ZERO, half_of_exp, larger
from lora_core.cpu.compiled.heads import Heads, gather, place, row, scatter, transpose
from lora_core.cpu.compiled.jit import contracted, reordered
from lora_core.cpu.compiled.panel import LANES, ROWS, WIDTH, Matrix, by_rows, multiply, transposed
from lora_core.cpu.compiled.share import share

# queries whose scores are made together: with 32 forward and backward of 512 tokens took 11.1 ms, with 64, which have
# more keys that some of them do not see, 12.2 (two threads of an Intel Xeon, family 6 model 207). And scores that there
# are at most, 256 KiB of them: with their gradients they stay in a core's second cache
QUERIES, SCORES = 32, 2**16


class Sizes(NamedTuple):
    """Heads of queries and of keys, tokens, and elements of a query or key and of a value."""

    heads: int
    groups: int
    tokens: int
    width: int
    size: int


@contracted
def _taken_at_once(tokens: int) -> Any:
    """Return how many queries are taken at a time, and the columns of a matrix with one for each key.

    Those are whole panels, and LANES more: rows that lie a large power of two apart would share few lines of a cache.
    """
    columns = -(-tokens // WIDTH) * WIDTH + LANES
    return min(QUERIES, max(SCORES // columns // ROWS, 1) * ROWS), columns


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
def _forward(sizes: Sizes, q: Heads, k: Heads, v: Heads, scale: Any, o: Heads, first: int, last: int) -> None:
    # rows are copied: where they lie, those of other heads are between them, and what is read again leaves the cache
    heads, groups, tokens, width, size = sizes
    queries, columns = _taken_at_once(tokens)
    keys, values = np.empty((tokens, width), np.float32), np.empty((tokens, size), np.float32)
    # zeros for keys beyond the last, with which panels are filled
    turned_keys = np.zeros((width, columns), np.float32)
    asking, scores = np.empty((queries, width), np.float32), np.empty((queries, columns), np.float32)
    inverses = np.empty(queries, np.float32)
    for task in range(first, last):
        b, g = task // groups, task % groups
        gather(k, b, g, 0, tokens, keys)
        gather(v, b, g, 0, tokens, values)
        transpose(keys, turned_keys)
        for h in range(g * (heads // groups), (g + 1) * (heads // groups)):
            for start in range(0, tokens, queries):
                end = min(start + queries, tokens)
                rows, panels = end - start, -(-end // WIDTH) * WIDTH
                gather(q, b, h, start, end, asking)
                multiply(by_rows(asking), by_rows(turned_keys), by_rows(scores), rows, panels, width, False)
                for i in range(rows):
                    inverses[i] = _unnormalised(scores[i, :end], start + i + 1, scale)
                out = Matrix(o.data, place(o, b, h, start), o.token, 1)
                multiply(by_rows(scores), by_rows(values), out, rows, size, end, False)
                for i in range(rows):
                    line = row(o, b, h, start + i, size)
                    for d in range(size):
                        line[d] *= inverses[i]


@contracted
def _backward(
    sizes: Sizes,
    q: Heads,
    k: Heads,
    v: Heads,
    scale: Any,
    d_o: Heads,
    d_q: Heads,
    d_k: Heads,
    d_v: Heads,
    first: int,
    last: int,
) -> None:
    heads, groups, tokens, width, size = sizes
    queries, columns = _taken_at_once(tokens)
    keys, values = np.empty((tokens, width), np.float32), np.empty((tokens, size), np.float32)
    turned_keys, turned_values = np.zeros((width, columns), np.float32), np.zeros((size, columns), np.float32)
    of_keys, of_values = np.empty_like(keys), np.empty_like(values)
    asking, arrived = np.empty((queries, width), np.float32), np.empty((queries, size), np.float32)
    scores, grads = np.empty((queries, columns), np.float32), np.empty((queries, columns), np.float32)
    for task in range(first, last):
        b, g = task // groups, task % groups
        gather(k, b, g, 0, tokens, keys)
        gather(v, b, g, 0, tokens, values)
        transpose(keys, turned_keys)
        transpose(values, turned_values)
        of_keys[:] = ZERO
        of_values[:] = ZERO
        for h in range(g * (heads // groups), (g + 1) * (heads // groups)):
            for start in range(0, tokens, queries):
                end = min(start + queries, tokens)
                rows, panels = end - start, -(-end // WIDTH) * WIDTH
                gather(q, b, h, start, end, asking)
                gather(d_o, b, h, start, end, arrived)
                multiply(by_rows(asking), by_rows(turned_keys), by_rows(scores), rows, panels, width, False)
                multiply(by_rows(arrived), by_rows(turned_values), by_rows(grads), rows, panels, size, False)
                for i in range(rows):
                    _gradient(scores[i, :end], grads[i, :end], start + i + 1, scale)
                out = Matrix(d_q.data, place(d_q, b, h, start), d_q.token, 1)
                multiply(by_rows(grads), by_rows(keys), out, rows, width, end, False)
                multiply(transposed(scores), by_rows(arrived), by_rows(of_values), end, size, rows, True)
                multiply(transposed(grads), by_rows(asking), by_rows(of_keys), end, width, rows, True)
        scatter(of_keys, b, g, d_k)
        scatter(of_values, b, g, d_v)


@contracted
def forward(openmp: int, threads: int, counter: np.ndarray, step: int, count: int, *arguments: Any) -> None:
    """Write o for ranges of the keys' heads, of which all in a batch are counted.

    Arguments:
        sizes: width and size are multiples of LANES.
        q, k, v: float32.
        scale: float32, above 0.
        o: float32.
    """
    share(_forward, openmp, threads, counter, step, count, arguments)


@contracted
def backward(openmp: int, threads: int, counter: np.ndarray, step: int, count: int, *arguments: Any) -> None:
    """Write d_q, d_k and d_v for ranges of the keys' heads.

    Arguments:
        sizes, q, k, v, scale: as in forward.
        d_o: float32.
        d_q, d_k, d_v: float32.
    """
    share(_backward, openmp, threads, counter, step, count, arguments)
