"""Triton kernels for lora_core::lora_linear and its backward.

Forward:   S = drop(x) A^T                              shrink.py
           y = x W^T + s S B^T + b                      low_rank_matmul.py
Backward:  dS = s G B,  dB = s G^T S,  db = sum G       row_sum.py, from one read of G where that moves fewer bytes
           dA = dS^T drop(x)                            row_sum.py
           dx = G W + keep (dS A) / (1 - p)             as y

Either way as low_rank.py says. dW is formed only where W itself is trained. What is out of reach (reach.py)
takes the reference.

Reference: lora_core/reference/lora.py
"""

from collections.abc import Sequence

from torch import Tensor

from lora_core.kernels.low_rank import low_rank_gradients, low_rank_linear, path_of, skinny_product
from lora_core.kernels.reach import left_to_reference, near
from lora_core.ops.eager import register
from lora_core.ops.lora_linear import backward_op, op
from lora_core.reference import lora as reference


@near
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
    if left_to_reference("lora_linear", flat, weight, lora_a, lora_b):
        y, hidden = reference.forward(flat, weight, bias, lora_a, lora_b, scaling, dropout, seed)
    else:
        path = path or path_of(flat, weight.shape, len(lora_a))
        hidden = skinny_product(flat, lora_a, path, dropout, seed)
        y = low_rank_linear(flat, weight, bias, hidden, lora_b, scaling, path=path)
    return y.view(*x.shape[:-1], weight.shape[0]), hidden


@near
def launch_lora_linear_backward(
    d_y: Tensor,
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Run the backward; operands and results as the op has them, None where needs says that none is wanted.

    Args:
        path: "fused" or "library"; by default what was measured to be faster.
    """
    columns, rows = weight.shape
    need_x, need_weight, need_bias, need_a, need_b = needs
    flat, grad = None if x is None else x.reshape(-1, rows), d_y.reshape(-1, columns)
    d_x = d_weight = None
    if left_to_reference("lora_linear_backward", grad, weight, lora_a, lora_b):
        d_x, d_weight, d_bias, d_lora_a, d_lora_b = reference.backward(
            grad, flat, weight, lora_a, lora_b, hidden, scaling, dropout, seed, needs
        )
    else:
        path = path or path_of(grad, (rows, columns), len(lora_a))
        needs = (need_x, need_bias, need_a, need_b)
        d_s, d_bias, d_lora_a, d_lora_b = low_rank_gradients(
            grad, flat, lora_a, lora_b, hidden, scaling, dropout, seed, needs, path
        )
        if need_x and d_s is not None:
            d_x = low_rank_linear(grad, weight.T, None, d_s, lora_a.T, 1 / (1 - dropout), dropout, seed, path)
        if need_weight and flat is not None:
            d_weight = grad.T @ flat
    return None if d_x is None else d_x.view(*d_y.shape[:-1], rows), d_weight, d_bias, d_lora_a, d_lora_b


register(op, "cuda", launch_lora_linear)
register(backward_op, "cuda", launch_lora_linear_backward)
