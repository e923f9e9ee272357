"""Triton kernels for lora_core::grouped_lora and its backward: rows of one batch that belong to different adapters.

    S_m = x_m A_g^T,  dS_m = s_g G_m B_g               gather_shrink.py
    y_m = base_m + s_g S_m B_g^T,  dx_m = dS_m A_g     gather_expand.py
    dA_g = sum dS_m^T x_m,  dB_g = s_g sum G_m^T S_m   gather_gradient.py

Rows are sorted by adapter on the device (groups.py), and so are those of S, each as long as its adapter's rank. What is
out of reach (reach.py) takes the reference.

Reference: lora_core/reference/grouped.py
"""

from collections.abc import Sequence

from torch import Tensor

from lora_core.kernels.gather_expand import launch_gather_expand
from lora_core.kernels.gather_gradient import launch_gather_gradient
from lora_core.kernels.gather_shrink import launch_gather_shrink
from lora_core.kernels.groups import groups
from lora_core.kernels.log import log_launch
from lora_core.kernels.reach import left_to_reference, near
from lora_core.ops.eager import register
from lora_core.ops.grouped_lora import backward_op, op
from lora_core.reference import grouped as reference


@near
def launch_grouped_lora(
    x: Tensor,
    base: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    ranks: Sequence[int],
    adapter: Tensor,
    scaling: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run the forward; operands and results as the op has them, any strides of x, base, lora_a and lora_b."""
    if left_to_reference("grouped_lora", x, lora_a, lora_b, sides=(len(ranks),)):
        return reference.forward(x, base, lora_a, lora_b, ranks, adapter, scaling)
    log_launch("grouped_lora", "kernels", scaling)
    found = groups(adapter, ranks)
    # cleared, as what lies behind the last row is returned, too
    hidden = lora_a.new_zeros(len(x) * max(ranks, default=0))
    launch_gather_shrink(x, lora_a, found, ranks, None, hidden)
    return launch_gather_expand(hidden, lora_b.T, found, ranks, scaling.contiguous(), base, x.dtype), hidden


@near
def launch_grouped_lora_backward(
    d_y: Tensor,
    x: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    ranks: Sequence[int],
    adapter: Tensor,
    scaling: Tensor,
    hidden: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Run the backward; operands and results as the op has them, None where needs says that none is wanted."""
    need_x, need_a, need_b = needs
    if left_to_reference("grouped_lora_backward", d_y, lora_a, lora_b, sides=(len(ranks),)):
        return reference.backward(d_y, x, lora_a, lora_b, ranks, adapter, scaling, hidden, needs)
    log_launch("grouped_lora_backward", "kernels", scaling, hidden)
    found, scaling, hidden = groups(adapter, ranks), scaling.contiguous(), hidden.contiguous()
    d_x = d_lora_a = d_lora_b = None
    if need_x or need_a:
        d_s = lora_a.new_empty(len(d_y) * max(ranks, default=0))
        launch_gather_shrink(d_y, lora_b.T, found, ranks, scaling, d_s)
        if need_x:
            d_x = launch_gather_expand(d_s, lora_a, found, ranks, None, None, d_y.dtype)
        if need_a and x is not None:
            d_lora_a = lora_a.new_empty(lora_a.shape)
            launch_gather_gradient(d_s, x, found, ranks, None, d_lora_a)
    if need_b:
        d_lora_b = lora_b.new_empty(lora_b.shape)
        launch_gather_gradient(hidden, d_y, found, ranks, scaling, d_lora_b.T)
    return d_x, d_lora_a, d_lora_b


register(op, "cuda", launch_grouped_lora)
register(backward_op, "cuda", launch_grouped_lora_backward)
