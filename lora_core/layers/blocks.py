"""What stands between the linear layers of a transformer's blocks, fused: norms, the gate of an MLP, attention's parts.

Each of them is a handful of PyTorch's operations, which read and write what they work on again and again and keep much
of it for the backward. Here each is one operation with a backward of its own. A compiler fuses them itself, and is let.
Attention has a file of its own, block_attention.py.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lora_core.layers.as_written import runs_as_written
from lora_core.layers.fused import Fused
from lora_core.ops.checks import LARGEST, is_transformed
from lora_core.ops.ready import of_one_kind
from lora_core.ops.rms_norm import rms_norm
from lora_core.ops.swiglu import swiglu

# elements below which, on a CPU, the call of an operation takes longer than it saves, as of one token: with 2^12 a norm
# took 29 us where PyTorch's operations took 20, a gate 19 and 5, queries and keys to rotate 43 and 35; with 2^16 they
# took 36 and 37, 38 and 27, 69 and 131 (two threads of an Intel Xeon, family 6 model 207)
FEW = 2**15
# a forward that computes nn.SiLU's formula in other words, by module and name
SILU_TOO = ("transformers.activations", "SiLUActivation.forward")


class BlockPart(Fused):
    """A part of a transformer's block that computes nothing of a linear layer itself."""


class FusedRMSNorm(BlockPart):
    """An RMS norm with a weight for each column, as torch.nn.RMSNorm and transformers' Llama have it."""

    def alone(self: Any, x: Tensor) -> Tensor | None:
        fit = fits(x, self.weight) and x.shape[-1:] == self.weight.shape != (0,)
        eps = _epsilon(self, x) if fit else None
        return None if eps is None else rms_norm(x, self.weight, eps)


class FusedGatedMLP(BlockPart):
    """down_proj(silu(gate_proj(x)) * up_proj(x)), as in transformers' Llama; the three layers are called as ever."""

    def alone(self: Any, x: Tensor) -> Tensor | None:
        if in_a_graph() or not is_silu(self.act_fn):
            return None
        gate, up = self.gate_proj(x), self.up_proj(x)
        fit = fits(gate, up) and gate.shape == up.shape
        y: Tensor = self.down_proj(swiglu(gate, up) if fit else self.act_fn(gate) * up)
        return y


def is_silu(module: Any) -> bool:
    """Say whether calling this module means silu and nothing else."""
    if not isinstance(module, nn.Module):
        return False
    forward: Any = type(module).forward
    silu = forward is nn.SiLU.forward or (forward.__module__, forward.__qualname__) == SILU_TOO
    return silu and runs_as_written(module, forward)


def _epsilon(norm: Any, x: Tensor) -> float | None:
    """Return what a norm adds to the mean square, None where the operation does not take it or PyTorch chooses it."""
    eps = norm.eps if isinstance(norm, nn.RMSNorm) else norm.variance_epsilon
    if eps is None and isinstance(norm, nn.RMSNorm) and x.dtype in (torch.float32, torch.float64):
        # in half precision it is not that of the dtype
        return torch.finfo(x.dtype).eps
    return eps if isinstance(eps, (int, float)) and 0 <= eps <= LARGEST else None


def fits(*tensors: Any) -> bool:
    """Say whether an operation takes these as they are, is worth its call, and runs now, not in a graph."""
    if in_a_graph() or not of_one_kind(*tensors):
        return False
    return tensors[0].device.type != "cpu" or tensors[0].numel() >= FEW


def in_a_graph() -> bool:
    """Say whether a compiler or a tracer looks on, or a transform, for which a formula of PyTorch's is better."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed()
