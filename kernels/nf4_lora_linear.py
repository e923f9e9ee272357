"""Triton kernels for lora_core::nf4_lora_linear and its backward: LoRA on a frozen NF4 weight.

Few tokens:    W is decoded inside the product, forward and for dL/dx          nf4_matmul.py
More tokens:   W is dequantised in panels of rows that a GPU's cache can hold  nf4_dequantize.py
               and each is multiplied as a dense weight is                     lora_linear.py

The backward's dL/dx sums over W's rows: panels would be rounded in between, so there W is made whole, and let go.
The low-rank gradients are lora_linear's. float64 takes the reference.

Reference: lora_core/reference/lora.py, lora_core/reference/nf4.py
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lora_core.kernels.crossover import log, log_launch
from lora_core.kernels.lora_linear import launch_lora_linear, launch_lora_linear_backward
from lora_core.kernels.low_rank import low_rank_gradients, low_rank_linear, low_rank_part, path_of, skinny_product
from lora_core.kernels.low_rank_matmul import launch_low_rank_matmul
from lora_core.kernels.nf4_matmul import MOST_TOKENS, launch_nf4_matmul
from lora_core.ops.eager import register
from lora_core.ops.nf4_lora_linear import backward_op, op
from lora_core.ops.packed import Packed

# the fewer panels, the fewer products that end with multiprocessors idle
PANEL_BYTES = 2**26


def panels(w: Packed, dtype: torch.dtype, panel_bytes: int = PANEL_BYTES) -> Iterator[tuple[int, int, Packed]]:
    """Yield (first row, row behind the last, packed rows) of a weight's panels; each begins with a scale of its own.

    Args:
        w: the weight, codes contiguous.
        dtype: that it will be dequantised to.
        panel_bytes: a panel is the most rows that fit in, but at least as many as can be cut off.
    """
    n, k = w.shape
    # a panel must begin with a block, and a second-level block where there are such
    unit = w.block_size * (w.nested_block_size if w.nested_absmax is not None else 1)
    step = unit // math.gcd(k, unit)
    rows = max(panel_bytes // max(k * dtype.itemsize, 1) // step, 1) * step
    for first in range(0, n, rows):
        end = min(first + rows, n)
        start, stop = first * k, end * k
        block, last = start // w.block_size, -(-stop // w.block_size)
        nested = w.nested_absmax
        if nested is not None:
            nested = nested.reshape(-1)[block // w.nested_block_size : -(-last // w.nested_block_size)]
        yield (
            first,
            end,
            w._replace(
                codes=w.codes.view(-1)[start // 2 : (stop + 1) // 2],
                absmax=w.absmax.reshape(-1)[block:last],
                nested_absmax=nested,
                shape=(end - first, k),
            ),
        )


def launch_nf4_lora_linear(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    block_size: int,
    nested_block_size: int,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    path: str | None = None,
    panel_bytes: int = PANEL_BYTES,
) -> tuple[Tensor, Tensor]:
    """Run the forward; operands as checked by the op. Copies x only where its leading dimensions cannot be flattened.

    Args:
        path: "fused" or "library"; by default what was measured to be faster for a dense W.
        panel_bytes: size of a dequantised panel.
    Returns:
        y [..., N] and S [M, R].
    """
    w = Packed(codes.contiguous(), absmax, nested_absmax, nested_offset, shape, block_size, nested_block_size)
    if x.dtype == torch.float64:
        log_launch("nf4_lora_linear", "float64, W made whole", codes, absmax)
        return launch_lora_linear(x, w.dense(x.dtype), bias, lora_a, lora_b, scaling, dropout, seed)
    flat = x.reshape(-1, shape[1])
    path = path or path_of(flat, shape, len(lora_a))
    hidden = skinny_product(flat, lora_a, path, dropout, seed)
    y = packed_low_rank_linear(flat, w, bias, hidden, lora_b, scaling, path, panel_bytes)
    return y.view(*x.shape[:-1], shape[0]), hidden


def packed_low_rank_linear(
    x: Tensor,
    w: Packed,
    bias: Tensor | None,
    hidden: Tensor,
    lora_b: Tensor,
    scaling: float,
    path: str | None = None,
    panel_bytes: int = PANEL_BYTES,
) -> Tensor:
    """Return x W^T + scaling S B^T + b for a packed W [N, K], codes contiguous; x [M, K], S [M, R], B [N, R].

    Args:
        x, bias, hidden, lora_b, scaling: as in launch_low_rank_matmul.
        path, panel_bytes: as in launch_nf4_lora_linear.
    """
    if len(x) <= MOST_TOKENS:
        log.debug("nf4 linear %s m=%d n=%d k=%d: decoded in the product", x.dtype, len(x), *w.shape)
        return launch_nf4_matmul(x, *w, bias, hidden, lora_b, scaling)
    log.debug("nf4 linear %s m=%d n=%d k=%d: in panels", x.dtype, len(x), *w.shape)
    path = path or path_of(x, w.shape, lora_b.shape[1])
    begun = path == "library" and (bias is not None or lora_b.shape[1] > 0)
    y = low_rank_part(x, w.shape[0], bias, hidden, lora_b, scaling) if begun else x.new_empty(len(x), w.shape[0])
    for first, end, panel in panels(w, x.dtype, panel_bytes):
        dense, columns = panel.dense(x.dtype), y[:, first:end]
        if path == "library":
            torch.addmm(columns, x, dense.T, beta=int(begun), out=columns)
        else:
            part = None if bias is None else bias[first:end]
            launch_low_rank_matmul(x, dense, part, hidden, lora_b[first:end], scaling, out=columns)
    return y


def launch_nf4_lora_linear_backward(
    d_y: Tensor,
    d_hidden: Tensor | None,
    x: Tensor | None,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    block_size: int,
    nested_block_size: int,
    lora_a: Tensor,
    lora_b: Tensor,
    hidden: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    needs: Sequence[bool],
    path: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the backward; operands and results as the op has them, empty where needs says that none is wanted.

    Args:
        path: "fused" or "library"; by default what was measured to be faster for a dense W.
    """
    columns, rows = shape
    w = Packed(codes, absmax, nested_absmax, nested_offset, shape, block_size, nested_block_size)
    grad, flat = d_y.reshape(-1, columns), None if x is None else x.reshape(-1, rows)
    need_x, *need_others = needs
    adapter = (lora_a, lora_b, hidden, scaling, dropout, seed)
    if d_y.dtype == torch.float64:
        # without d_x the weight does not matter
        dense = w.dense(d_y.dtype) if need_x else d_y.new_empty(columns, rows)
        wanted = (need_x, False, *need_others)
        wide = launch_lora_linear_backward(d_y, d_hidden, x, dense, *adapter, wanted)
        return wide[0], *wide[2:]
    path = path or path_of(grad, (rows, columns), len(lora_a))
    d_s, d_bias, d_lora_a, d_lora_b = low_rank_gradients(grad, d_hidden, flat, *adapter, needs, path)
    d_x = None
    if need_x and d_s is not None:
        d_x = packed_input_gradient(grad, w, d_s, lora_a, dropout, seed, path)
        d_x = d_x.view(*d_y.shape[:-1], rows)
    d_x, d_bias, d_lora_a, d_lora_b = (d_y.new_empty(0) if g is None else g for g in (d_x, d_bias, d_lora_a, d_lora_b))
    return d_x, d_bias, d_lora_a, d_lora_b


def packed_input_gradient(
    d_y: Tensor,
    w: Packed,
    d_s: Tensor,
    lora_a: Tensor,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    path: str | None = None,
    total: Tensor | None = None,
) -> Tensor:
    """Return G W + keep (dS A) / (1 - p): G [M, N], W [N, K] packed, dS [M, R], A [R, K].

    Args:
        d_y: G, dtype float32, float16 or bfloat16.
        w: W.
        d_s: dS, dtype of lora_a.
        lora_a, dropout, seed: as the forward had them.
        path, total: as in low_rank_linear.
    """
    up = (d_s, lora_a.T, 1 / (1 - dropout), dropout, seed)
    few = len(d_y) <= MOST_TOKENS
    log_launch("nf4 dx", "decoded in the product" if few else "W made whole", w.codes, w.absmax, w.nested_absmax)
    if few:
        d_x = launch_nf4_matmul(d_y, *w, None, *up, transposed=True)
        return d_x if total is None else total.add_(d_x)
    return low_rank_linear(d_y, w.dense(d_y.dtype).T, None, *up, path, total)


register(op, "cuda", launch_nf4_lora_linear)
register(backward_op, "cuda", launch_nf4_lora_linear_backward)
