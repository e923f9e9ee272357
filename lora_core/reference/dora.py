"""The row norms that DoRA divides by, without forming the updated weight.

DoRA's weight is  m * V / |V|  row by row, with V = W + s B A. By algebra, for row n,

    |V_n|^2 = |W_n|^2 + 2 s <B_n, (W A^T)_n> + s^2 B_n (A A^T) B_n^T

The three terms are as large as |W_n|^2, and cancel where the update takes most of W_n away: a norm errs by some
sqrt(u) (|W_n| + s |(B A)_n|), with u the unit roundoff, and may come out as 0 where it is smaller than that.

W A^T is [N, R], A A^T is [R, R]: 2 N K R operations and N R numbers instead of a dense [N, K] beside W. The gradient
does not flow through the norm (section 4.3): it is a constant of each step.

Source: Liu et al. 2024 (arXiv 2402.09353), eq. 5 and section 4.3. The paper says column by column; PEFT takes one norm
for each output, which is a row of W as it is stored, [out, in].
"""

import torch
from torch import Tensor


def dora_norm_dense(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """Return |W + s B A| row by row, as one would write it on a board; shapes and dtypes as in dora_norm."""
    wide = torch.promote_types(lora_a.dtype, torch.float32)
    return (weight.to(wide) + scaling * (lora_b.to(wide) @ lora_a.to(wide))).norm(dim=1)


def dora_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """Return |W + s B A| row by row, by the algebra above.

    Args:
        weight: W, shape [N, K].
        lora_a: A, shape [R, K].
        lora_b: B, shape [N, R].
        scaling: s.
    Returns:
        Shape [N], float32, or float64 where A is.
    """
    wide = torch.promote_types(lora_a.dtype, torch.float32)
    w, a, b = (t.to(wide) for t in (weight, lora_a, lora_b))
    # a tensor of squares would be as large as W
    squares = (
        torch.linalg.vector_norm(w, dim=1).square()
        + 2 * scaling * (b * (w @ a.T)).sum(1)
        + update_squares(a, b, scaling)
    )
    # rounding can leave a norm of zero a little below it
    return squares.clamp(min=0).sqrt()


def update_squares(lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """Return s^2 B_n (A A^T) B_n^T for each row n, shape [N]: what the update has on its own, free of W."""
    return scaling**2 * (lora_b * (lora_b @ (lora_a @ lora_a.T))).sum(1)
