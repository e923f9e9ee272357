"""Triton kernels for lora_core::lora_linear and its backward.

Forward:   S = drop(x) A^T                              shrink.py
           y = x W^T + s S B^T + b                      low_rank_matmul.py, or a library's product and S B^T added to it
Backward:  dS = s G B,  dB = s G^T S,  db = sum G       row_sum.py, from one read of G where that moves fewer bytes
           dA = dS^T drop(x)                            row_sum.py
           dx = G W + keep (dS A) / (1 - p)             as y

dW is formed only where W itself is trained. float64 takes the reference.

Reference: lora_core/reference/lora.py
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.kernels import row_sum
from lora_core.kernels.crossover import device_name, faster_path, log, log_launch
from lora_core.kernels.low_rank_matmul import launch_low_rank_matmul
from lora_core.kernels.row_sum import launch_row_sum
from lora_core.kernels.shrink import launch_shrink
from lora_core.ops.lora_linear import backward_op, op
from lora_core.reference import lora as reference

# bytes a part of a float32 sum moves: written once and read once
PART_BYTES = 8


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    lora_b: Tensor,
    factor: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    path: str | None = None,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """Return x W^T + factor keep (S B^T) + b by the faster path; x [M, K], W [N, K], S [M, R], B [N, R].

    Args:
        x, weight, bias, hidden, lora_b, factor, dropout, seed, out, accumulate: as in launch_low_rank_matmul; no bias
            where out is added to.
        path: "fused" or "library"; by default what was measured to be faster.
    """
    (m, k), n, r = x.shape, weight.shape[0], lora_b.shape[1]
    path = path or faster_path(device_name(x.device), x.dtype, m, n, k, r)
    log.debug("linear %s m=%d n=%d k=%d r=%d: %s", x.dtype, m, n, k, r, path)
    if path == "fused":
        return launch_low_rank_matmul(x, weight, bias, hidden, lora_b, factor, dropout, seed, out, accumulate)
    if out is not None and accumulate:
        y = out.addmm_(x, weight.T)
    else:
        y = F.linear(x, weight, bias) if out is None else _product_into(out, x, weight, bias)
    if r == 0:
        return y
    if lora_b.dtype == y.dtype and not dropout:
        return y.addmm_(hidden, lora_b.T, alpha=factor)
    # mixed dtypes and masks would cost temporaries of y's size
    return launch_low_rank_matmul(
        x[:, :0], weight[:, :0], None, hidden, lora_b, factor, dropout, seed, y, accumulate=True
    )


def _product_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)


def launch_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    path: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the forward; operands as checked by the op. Copies x only where its leading dimensions cannot be flattened.

    Args:
        path: "fused" or "library"; by default what was measured to be faster.
    Returns:
        y [..., N] and S [M, R].
    """
    flat = x.reshape(-1, weight.shape[1])
    if x.dtype == torch.float64:
        log.debug("linear float64: reference")
        y, hidden = reference.forward(flat, weight, bias, lora_a, lora_b, scaling, dropout, seed)
    else:
        hidden = launch_shrink(flat, lora_a, dropout, seed)
        y = low_rank_linear(flat, weight, bias, hidden, lora_b, scaling, path=path)
    return y.view(*x.shape[:-1], weight.shape[0]), hidden


def low_rank_gradients(
    d_y: Tensor,
    d_hidden: Tensor | None,
    x: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    hidden: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return (dS, d_bias, dA, dB), of what needs = (x, bias, lora_a, lora_b) asks for; None for the others.

    dS is there if x or lora_a needs it. Operands as in reference.lora.backward.
    """
    need_x, need_bias, need_a, need_b = needs
    need_s = need_x or need_a
    d_s = d_bias = d_lora_a = d_lora_b = None
    # parts of dS for each block of columns move 8 R bytes a block and row; a second read of G its own size
    columns, ranks = row_sum.BLOCK_C[lora_b.dtype], lora_b.shape[1]
    together = (
        need_s and ranks <= row_sum.BLOCK_R[lora_b.dtype][0] and PART_BYTES * ranks < columns * d_y.element_size()
    )
    log_launch(
        "gradients of A and B", "one read of dy" if together and need_b else "a read of dy each", hidden, d_hidden
    )
    if need_b:
        d_lora_b, d_bias, d_s = launch_row_sum(
            d_y, hidden, scaling, hidden_of=lora_b if together else None, add=d_hidden, bias=need_bias
        )
    if need_bias and d_bias is None:
        d_bias = d_y.sum(0)
    if need_s and d_s is None:
        d_s = launch_shrink(d_y, lora_b.T, factor=scaling, add=d_hidden)
    if need_a and x is not None and d_s is not None:
        d_lora_a = launch_row_sum(x, d_s, 1.0, dropout, seed, transposed=True).product
    return d_s, d_bias, d_lora_a, d_lora_b


def launch_lora_linear_backward(
    d_y: Tensor,
    d_hidden: Tensor | None,
    x: Tensor | None,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    hidden: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    needs: Sequence[bool],
    path: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the backward; operands and results as the op has them, empty where needs says that none is wanted.

    Args:
        path: "fused" or "library" for d_x; by default what was measured to be faster.
    """
    columns, rows = weight.shape
    need_x, need_weight, need_bias, need_a, need_b = needs
    flat, grad = None if x is None else x.reshape(-1, rows), d_y.reshape(-1, columns)
    d_x = d_weight = None
    if d_y.dtype == torch.float64:
        log_launch("lora_linear_backward", "float64, reference")
        d_x, d_weight, d_bias, d_lora_a, d_lora_b = reference.backward(
            grad, d_hidden, flat, weight, lora_a, lora_b, hidden, scaling, dropout, seed, needs
        )
    else:
        d_s, d_bias, d_lora_a, d_lora_b = low_rank_gradients(
            grad, d_hidden, flat, lora_a, lora_b, hidden, scaling, dropout, seed, (need_x, need_bias, need_a, need_b)
        )
        if need_x and d_s is not None:
            d_x = low_rank_linear(grad, weight.T, None, d_s, lora_a.T, 1 / (1 - dropout), dropout, seed, path)
        if need_weight and flat is not None:
            d_weight = grad.T @ flat
    d_x = None if d_x is None else d_x.view(*d_y.shape[:-1], rows)
    d_x, d_weight, d_bias, d_lora_a, d_lora_b = (
        d_y.new_empty(0) if g is None else g for g in (d_x, d_weight, d_bias, d_lora_a, d_lora_b)
    )
    return d_x, d_weight, d_bias, d_lora_a, d_lora_b


op.register_kernel("cuda")(launch_lora_linear)
backward_op.register_kernel("cuda")(launch_lora_linear_backward)
