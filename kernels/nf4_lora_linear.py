"""Triton kernels for lora_core::nf4_lora_linear and its backward: LoRA on a frozen NF4 weight.

Few tokens:    W is decoded inside the product, forward and for dL/dx              nf4_matmul.py
More tokens:   W is dequantised in panels that a GPU's cache can hold: of rows,    nf4_dequantize.py
               and of columns for dL/dx, which sums over the rows.                 nf4_columns.py
               Each is multiplied as a dense weight is                             low_rank.py

The low-rank gradients are lora_linear's. What is out of reach (reach.py) takes the
reference.

Reference: lora_core/reference/lora.py, lora_core/reference/nf4.py
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_core.kernels.log import log, log_launch
from lora_core.kernels.lora_linear import launch_lora_linear, launch_lora_linear_backward
from lora_core.kernels.low_rank import low_rank_gradients, low_rank_linear, low_rank_part, path_of, skinny_product
from lora_core.kernels.low_rank_matmul import launch_low_rank_matmul
from lora_core.kernels.nf4_matmul import MOST_TOKENS, launch_nf4_matmul
from lora_core.kernels.nf4_panels import column_panels, row_panels, size_of_panels
from lora_core.kernels.reach import left_to_reference, near
from lora_core.ops.eager import register
from lora_core.ops.nf4_lora_linear import backward_op, op
from lora_core.ops.packed import Packed


@near
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
    panel_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the forward; operands as checked by the op. Copies x only where its leading dimensions cannot be flattened.

    Args:
        path: "fused" or "library"; by default what was measured to be faster for a dense W.
        panel_bytes: size of a dequantised panel at most; by default as size_of_panels says.
    Returns:
        y [..., N] and S [M, R].
    """
    w = Packed(codes, absmax, nested_absmax, nested_offset, shape, block_size, nested_block_size)
    flat = x.reshape(-1, shape[1])
    if left_to_reference("nf4_lora_linear", flat, lora_a, lora_b):
        return launch_lora_linear(x, w.dense(x.dtype), bias, lora_a, lora_b, scaling, dropout, seed)
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
    panel_bytes: int | None = None,
) -> Tensor:
    """Return x W^T + scaling S B^T + b for a packed W [N, K]; x [M, K], S [M, R], B [N, R].

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
    for first, end, panel in row_panels(w, x.dtype, panel_bytes or size_of_panels(x)):
        dense, columns = panel.dense(x.dtype), y[:, first:end]
        if path == "library":
            torch.addmm(columns, x, dense.T, beta=int(begun), out=columns)
        else:
            part = None if bias is None else bias[first:end]
            launch_low_rank_matmul(x, dense, part, hidden, lora_b[first:end], scaling, out=columns)
    return y


@near
def launch_nf4_lora_linear_backward(
    d_y: Tensor,
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
    panel_bytes: int | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Run the backward; operands and results as the op has them, None where needs says that none is wanted.

    Args:
        path, panel_bytes: as in launch_nf4_lora_linear.
    """
    columns, rows = shape
    w = Packed(codes, absmax, nested_absmax, nested_offset, shape, block_size, nested_block_size)
    grad, flat = d_y.reshape(-1, columns), None if x is None else x.reshape(-1, rows)
    need_x, *need_others = needs
    adapter = (lora_a, lora_b, hidden, scaling, dropout, seed)
    if left_to_reference("nf4_lora_linear_backward", grad, lora_a, lora_b):
        # without d_x the weight does not matter
        dense = w.dense(d_y.dtype) if need_x else d_y.new_empty(columns, rows)
        wanted = (need_x, False, *need_others)
        wide = launch_lora_linear_backward(d_y, x, dense, *adapter, wanted)
        return wide[0], *wide[2:]
    path = path or path_of(grad, (rows, columns), len(lora_a))
    d_s, d_bias, d_lora_a, d_lora_b = low_rank_gradients(grad, flat, *adapter, needs, path)
    d_x = None
    if need_x and d_s is not None:
        d_x = packed_input_gradient(grad, w, d_s, lora_a, dropout, seed, path, panel_bytes=panel_bytes)
        d_x = d_x.view(*d_y.shape[:-1], rows)
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
    panel_bytes: int | None = None,
) -> Tensor:
    """Return G W + keep (dS A) / (1 - p): G [M, N], W [N, K] packed, dS [M, R], A [R, K].

    Args:
        d_y: G, dtype float32, float16 or bfloat16.
        w: W.
        d_s: dS, dtype of lora_a.
        lora_a, dropout, seed: as the forward had them.
        path, total: as in low_rank_linear.
        panel_bytes: as in launch_nf4_lora_linear.
    """
    up = (d_s, lora_a.T, 1 / (1 - dropout), dropout, seed)
    n, k = w.shape
    panel_bytes = panel_bytes or size_of_panels(d_y)
    few, whole = len(d_y) <= MOST_TOKENS, n * k * d_y.itemsize <= panel_bytes
    way = "decoded in the product" if few else "W made whole" if whole else "in panels of columns"
    log_launch("nf4 dx", way)
    if few:
        d_x = launch_nf4_matmul(d_y, *w, None, *up, transposed=True)
        return d_x if total is None else total.add_(d_x)
    if whole:
        return low_rank_linear(d_y, w.dense(d_y.dtype).T, None, *up, path, total)
    path = path or path_of(d_y, (k, n), len(lora_a))
    # a panel's own mask would begin with its first column: with one, the low-rank part is made for all of them
    begun = path == "library" or dropout > 0 or total is not None
    d_x = low_rank_part(d_y, k, None, *up, total) if begun else d_y.new_empty(len(d_y), k)
    rank = 0 if begun else len(lora_a)
    for first, end, dense in column_panels(w, d_y.dtype, panel_bytes):
        columns = d_x[:, first:end]
        if path == "library":
            torch.addmm(columns, d_y, dense, out=columns)
        else:
            low = (d_s[:, :rank], lora_a[:rank, first:end].T)
            launch_low_rank_matmul(d_y, dense.T, None, *low, up[2], out=columns, accumulate=begun)
    return d_x


register(op, "cuda", launch_nf4_lora_linear)
register(backward_op, "cuda", launch_nf4_lora_linear_backward)
