"""Which modules between a model's linear layers can be fused: those that compute what transformers' Llama does.

Most of transformers' models were derived from it and repeat its norm, its MLP and its rotation word for word. So a
module is recognised by its source, and by that of what it calls. That Llama's computes what the operations do is asked
of it once, with numbers. Of an attention no more has to be known than that it asks transformers for what attends.
"""

import ast
import functools
import importlib
import itertools
import sys
import types
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lora_core.adapt.remembered import remembered
from lora_core.adapt.source import source_of
from lora_core.layers.as_written import is_patched
from lora_core.layers.block_attention import ROTATION, FusedAttention, FusedRotatingAttention, asks, sdpa_forward
from lora_core.layers.blocks import BlockPart, FusedGatedMLP, FusedRMSNorm, is_silu
from lora_core.layers.loaded import loads
from lora_core.ops.rms_norm import rms_norm
from lora_core.ops.rotary import rotary
from lora_core.ops.swiglu import swiglu

GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")


def block_part_class(module: nn.Module) -> type[BlockPart] | str | None:
    """Return what fuses this module, why nothing does, or None for one that is no norm, gated MLP or attention."""
    if isinstance(module, BlockPart):
        return "it is fused already"
    found = _candidate(module)
    if isinstance(found, type) and is_patched(module):
        return "its forward is patched on the module itself, as accelerate's hooks do: take the patch off first"
    if isinstance(found, type) and is_parametrized(module):
        return "it is parametrized, by a class of its own that has to be its first: take the parametrization off first"
    return found


def _candidate(module: Any) -> type[BlockPart] | str | None:
    kind, forward = type(module), type(module).forward
    other = f"{kind.__name__} is written otherwise than in transformers' Llama"
    if kind is nn.RMSNorm:
        fits = module.weight is not None and len(module.normalized_shape) == 1
        return FusedRMSNorm if fits else "it has no weight, or normalises more than the last dimension"
    if kind.__name__.endswith("RMSNorm"):
        return FusedRMSNorm if hasattr(module, "variance_epsilon") and _as_llama(forward, "LlamaRMSNorm") else other
    if all(hasattr(module, name) for name in GATED):
        if not is_silu(module.act_fn):
            return f"its gate is {type(module.act_fn).__name__}, of which no operation is made, or has hooks"
        return FusedGatedMLP if _as_llama(forward, "LlamaMLP") else other
    rotates = any(True for _ in loads(forward, ROTATION))
    if rotates and _as_llama(forward.__globals__.get(ROTATION), ROTATION):
        return FusedRotatingAttention
    # what never attends to earlier tokens alone, as in an encoder, has nothing to fuse
    if asks(forward) and getattr(module, "is_causal", True) and sdpa_forward() is not None:
        return FusedAttention
    return other if rotates else None


def _as_llama(function: Any, name: str) -> bool:
    """Say whether a function does, word for word, what Llama's forward or function of this name does."""
    # what is found without it would be remembered when it is there
    original = _llama().get(name) if "transformers" in sys.modules else None
    return original is not None and _is_the_same(function, original)


def _is_the_same(function: Any, original: Any) -> bool:
    """Say whether a function says what the original does, and means the same by each name of its module."""
    if function is original:
        return True
    if not all(isinstance(f, types.FunctionType) and f.__closure__ is None for f in (function, original)):
        return False
    if (words := _words(function)) is None or words != _words(original):
        return False
    named = ([f.__globals__.get(name) for name in original.__code__.co_names] for f in (function, original))
    return all(itertools.starmap(_is_the_same, zip(*named, strict=True)))


@remembered
def _words(function: Any) -> str | None:
    """Return what a function takes and does, without annotations and docstring; None where it cannot be read.

    Nor can it where a decorator wraps it, which may do anything.
    """
    found = None if hasattr(function, "__wrapped__") else source_of(function)
    if found is None:
        return None
    body = found.body[1:] if ast.get_docstring(found) is not None else found.body
    return " ".join([*(a.arg for a in found.args.args), repr(function.__defaults__), *map(ast.dump, body)])


@functools.cache
def _llama() -> dict[str, Any]:
    """Return the forwards and the rotation of transformers' Llama that compute what the operations do, by name."""
    try:
        llama = importlib.import_module("transformers.models.llama.modeling_llama")
        found = {name: getattr(llama, name).forward for name in ("LlamaRMSNorm", "LlamaMLP")}
        found[ROTATION] = getattr(llama, ROTATION)
        return found if _computes_the_same(llama) else {}
    except (ImportError, AttributeError, TypeError, RuntimeError):
        # another version of transformers
        return {}


def _computes_the_same(llama: Any) -> bool:
    """Ask Llama's forwards, of stand-ins for modules, which take no random numbers."""
    x = torch.linspace(-9, 9, 240, dtype=torch.float64, device="cpu").sin().view(2, 3, 5, 8)
    other, weight, cos, sin = x.flip(0), x[0, 0, 0], x[:, 0], x[:, 1]
    norm = SimpleNamespace(weight=weight, variance_epsilon=1e-3)
    mlp = SimpleNamespace(gate_proj=nn.Identity(), up_proj=lambda x: other, act_fn=nn.SiLU(), down_proj=nn.Identity())
    theirs = (
        llama.LlamaRMSNorm.forward(norm, x),
        llama.LlamaMLP.forward(mlp, x),
        *llama.apply_rotary_pos_emb(x, other, cos, sin),
    )
    ours = (rms_norm(x, weight, 1e-3), swiglu(x, other), rotary(x, cos, sin), rotary(other, cos, sin))
    # the norm is made in float32
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(theirs, ours, strict=True))
