"""Operations of what stands between a block's linear layers, on small inputs beside their references."""

from collections.abc import Callable

import torch
from torch import Tensor

from lora_core.doctor.agreement import double, magnitude_of, require, within
from lora_core.doctor.cases import Case, operands
from lora_core.ops.causal_attention import OWN, causal_attention
from lora_core.ops.rms_norm import rms_norm
from lora_core.ops.rotary import rotary
from lora_core.ops.swiglu import swiglu
from lora_core.reference import causal_attention as attention
from lora_core.reference import rms_norm as norms
from lora_core.reference import rotary as rotation
from lora_core.reference import swiglu as gates

EPS = 1e-6
# that of heads of 16
SCALE = 0.25


def _check_norm(device: str, case: Case) -> str:
    x, weight = (t.requires_grad_() for t in _rows(device, case)[:2])
    y = rms_norm(x, weight, EPS)
    truth = norms.rms_norm(double(x), double(weight), EPS)
    # squares are of one sign: of their sum, too, the error is a share of the truth
    require(within(y, truth, truth.abs(), case.k), "outside the rounding bound")
    return "within rounding"


def _check_norm_backward(device: str, case: Case) -> str:
    x, weight, d_y = _rows(device, case)
    got = torch.autograd.grad(rms_norm(x.requires_grad_(), weight.requires_grad_(), EPS), (x, weight), d_y)
    r = norms.forward(double(x), double(weight), EPS)[1]
    truth = norms.backward(double(d_y), double(x), double(weight), r, True)
    n, g, w = (magnitude_of(t) for t in (x, d_y, weight))
    n = n * r[:, None]
    # both terms of the gradient of x, which is a difference
    magnitude = r[:, None] * (g * w + n * (g * w * n).mean(1, keepdim=True)), (g * n).sum(0)
    for name, own, t, m in zip(("x", "weight"), got, truth, magnitude, strict=True):
        # an error of r, which is that of a sum, is in the gradient three times
        right = t is not None and within(own, t, m, 9 * case.k + case.m)
        require(right, f"d_{name} is outside the rounding bound")
    return "gradients within rounding"


def _rows(device: str, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Return x [M, K], w [K] and dL/dy [M, K]."""
    o = operands(device, case)
    return o.x, o.weight[0], o.x.flip(1)


def _check_gate(device: str, case: Case) -> str:
    gate, up, _ = _gates(device, case)
    truth = gates.swiglu(double(gate), double(up))
    # an exponential's error is a share of its argument
    magnitude = (1 + magnitude_of(gate)) * truth.abs()
    require(within(swiglu(gate, up), truth, magnitude, case.k), "outside the rounding bound")
    return "within rounding"


def _check_gate_backward(device: str, case: Case) -> str:
    gate, up, d_y = _gates(device, case)
    got = torch.autograd.grad(swiglu(gate.requires_grad_(), up.requires_grad_()), (gate, up), d_y)
    truth = gates.backward(*map(double, (d_y, gate, up)))
    g, u, d = (magnitude_of(t) for t in (gate, up, d_y))
    magnitude = d * u * (1 + g) ** 2, (1 + g) * truth[1].abs()
    for name, own, t, m in zip(("gate", "up"), got, truth, magnitude, strict=True):
        require(within(own, t, m, case.k), f"d_{name} is outside the rounding bound")
    return "gradients within rounding"


def _gates(device: str, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Return gate, up and dL/dy, of one shape."""
    x = operands(device, case).x
    return x, x.flip(0), x.flip(1)


def _check_rotary(device: str, case: Case) -> str:
    x, cos, sin = _turned(device, case)
    truth = rotation.rotary(double(x), double(cos), double(sin))
    require(within(rotary(x, cos, sin), truth, _turned_magnitude(x, cos, sin), 2), "outside the rounding bound")
    return "within rounding"


def _check_rotary_backward(device: str, case: Case) -> str:
    x, cos, sin = _turned(device, case)
    d_y = x.flip(2)
    (got,) = torch.autograd.grad(rotary(x.requires_grad_(), cos, sin), (x,), d_y)
    truth = rotation.backward(double(d_y), double(cos), double(sin))
    require(within(got, truth, _turned_magnitude(d_y, cos, sin), 2), "d_x is outside the rounding bound")
    return "gradient within rounding"


def _turned(device: str, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Return x [1, 2, M, K], which lies token by token, and cosines and sines [1, M, K], of halves that are alike."""
    o = operands(device, case)
    angles = torch.cat((o.x[:, : case.k // 2],) * 2, 1)[None].float()
    x = torch.stack((o.x, o.x.flip(0)), 1)[None].transpose(1, 2)
    return x, angles.cos().to(o.x.dtype), angles.sin().to(o.x.dtype)


def _turned_magnitude(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the sum of both products' magnitudes: of one sign where the first half of the sines is negative."""
    first, second = magnitude_of(sin).chunk(2, -1)
    return rotation.rotary(magnitude_of(x), magnitude_of(cos), torch.cat((-first, second), -1))


def _check_attention(device: str, case: Case) -> str:
    if device not in OWN:
        return "PyTorch's own"
    q, k, v, d_o = _heads(device, case)
    d, x, y, z = (double(t) for t in (d_o, q, k, v))
    truth, magnitude = attention.causal_attention(x, y, z, SCALE), attention.magnitudes(d, x, y, z, SCALE)[0]
    require(within(causal_attention(q, k, v, SCALE), truth, magnitude, case.m), "outside the rounding bound")
    return "within rounding"


def _check_attention_backward(device: str, case: Case) -> str:
    if device not in OWN:
        return "PyTorch's own"
    q, k, v, d_o = _heads(device, case)
    d, x, y, z = (double(t) for t in (d_o, q, k, v))
    for leaf in (q, k, v):
        leaf.requires_grad_()
    got = torch.autograd.grad(causal_attention(q, k, v, SCALE), (q, k, v), d_o)
    truth, magnitude = attention.backward(d, x, y, z, SCALE), attention.magnitudes(d, x, y, z, SCALE)[1:]
    for name, own, t, m in zip("qkv", got, truth, magnitude, strict=True):
        require(within(own, t, m, 2 * case.m), f"d_{name} is outside the rounding bound")
    return "gradients within rounding"


def _heads(device: str, case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q [1, 4, M, 16], two heads for each of k and v [1, 2, M, 16], and d_o, all of which lie token by token."""
    x = operands(device, case).x
    tokens = x.repeat(1, -(-4 * 16 // case.k))[:, : 4 * 16].view(1, case.m, 4, 16).transpose(1, 2)
    return tokens.clone(), tokens[:, :2].flip(2), tokens[:, 2:].flip(3), tokens.flip(1)


# as in checks.CHECKS
BLOCK_CHECKS: dict[str, Callable[[str, Case], str]] = {
    "rms_norm": _check_norm,
    "rms_norm_backward": _check_norm_backward,
    "swiglu": _check_gate,
    "swiglu_backward": _check_gate_backward,
    "rotary": _check_rotary,
    "rotary_backward": _check_rotary_backward,
    "causal_attention": _check_attention,
    "causal_attention_backward": _check_attention_backward,
}
