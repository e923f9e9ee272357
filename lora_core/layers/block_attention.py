"""The attention of a block, fused: the rotation of its queries and keys, and, on a CPU, what attends.

Both are called by names of the forward's module. A fused forward is the same code, with other functions under these
names for itself alone. It is made at every call, in some microseconds, of what the names mean by then.
"""

import contextlib
import functools
import sys
import types
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.layers.blocks import BlockPart, fits, in_a_graph
from lora_core.layers.fused import Fused
from lora_core.layers.loaded import loads
from lora_core.ops.causal_attention import causal_attention, fit_together, is_better
from lora_core.ops.checks import LARGEST
from lora_core.ops.ready import alike
from lora_core.ops.rotary import are_heads, rotary

# what the attention of transformers' models calls, and where it asks for the function that attends
ROTATION, REGISTRY, ASKED = "apply_rotary_pos_emb", "ALL_ATTENTION_FUNCTIONS", "get_interface"
# that function where PyTorch's scaled_dot_product_attention is chosen, by module and name
SDPA_FORWARD = ("transformers.integrations.sdpa_attention", "sdpa_attention_forward")
# what that calls, unless another has been put in its place, as those who watch it do
SDPA = torch._C._nn.scaled_dot_product_attention
# the options that are understood here; of the others, what that function looks at has to be absent
UNDERSTOOD = frozenset({"dropout", "scaling", "is_causal"})


class FusedAttention(BlockPart):
    """An attention that asks transformers for the function that attends: where that is PyTorch's, an operation may."""

    # the forward that the class was made of, whether it asks, and what it rotates by, if that is known
    fused_forward: Any = None
    fused_asks: ClassVar[bool] = False
    fused_rotation: Any = None
    fused_rotates: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        fused_from: Any = vars(cls).get("fused_from")
        if fused_from is None:
            return
        forward = fused_from.forward
        cls.fused_forward, cls.fused_asks = staticmethod(forward), asks(forward)
        if cls.fused_rotates:
            cls.fused_rotation = staticmethod(forward.__globals__[ROTATION])

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kind = type(self)
        if not isinstance(self, Fused):
            # bound while the module was fused, and called after unfuse
            return kind.forward(self, *args, **kwargs)
        forward = kind.fused_from.forward
        # another one may have been put in its place; and one token is too little for any operation
        if not in_a_graph() and forward is kind.fused_forward and not _are_single(*args, *kwargs.values()):
            forward = _with_others(forward, kind.fused_asks, kind.fused_rotation)
        return forward(self, *args, **kwargs)


class FusedRotatingAttention(FusedAttention):
    """One that also rotates queries and keys by apply_rotary_pos_emb, as transformers' Llama has it."""

    fused_rotates = True


def _are_single(*given: Any) -> bool:
    """Say whether the first tensor of these holds no more than one token of each sequence, on a CPU."""
    first = next((t for t in given if isinstance(t, Tensor)), None)
    return first is not None and first.device.type == "cpu" and first.dim() > 1 and first.shape[-2] == 1


def asks(forward: Any) -> bool:
    """Say whether a forward asks transformers' registry for the function that attends, and nothing else of it."""
    return {*loads(forward, REGISTRY)} == {ASKED}


def sdpa_forward() -> Any:
    """Return transformers' function that calls PyTorch's attention; None where it is not there, or means another."""
    module, name = SDPA_FORWARD
    found = getattr(sys.modules.get(module), name, None)
    own = isinstance(found, types.FunctionType) and (found.__module__, found.__qualname__) == SDPA_FORWARD
    with contextlib.suppress(RuntimeError):
        return found if own and not hasattr(found, "__wrapped__") and _attends_causally(found) else None
    # it was told not to, as by sdpa_kernel, and is asked again
    return None


@functools.cache
def _attends_causally(function: Any) -> bool:
    """Ask it once, with numbers, whether it computes what causal_attention does.

    Raises:
        RuntimeError: if it does not compute, as things are.
    """
    q = torch.linspace(-9, 9, 240, dtype=torch.float64, device="cpu").sin().view(2, 4, 5, 6)
    k, v = q[:, :2].flip(2), q[:, 2:].flip(3)
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    try:
        theirs = function(module, q, k, v, None, dropout=0.0, scaling=0.7)[0]
        return torch.allclose(theirs, causal_attention(q, k, v, 0.7).transpose(1, 2), rtol=1e-5, atol=1e-5)
    except (TypeError, AttributeError, IndexError):
        # another version of transformers
        return False


class _Registry:
    """Stands for transformers' registry in one forward: where it would name one function, another is named."""

    def __init__(self, registry: Any, attend: Any) -> None:
        self._registry, self._attend = registry, attend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._registry, name)

    def get_interface(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the registry does, and for PyTorch's attention what runs the operation where it can."""
        found = self._registry.get_interface(*args, **kwargs)
        return _attending(found) if found is self._attend else found


def _attending(own: Any) -> Callable[..., tuple[Tensor, Any]]:
    """Return a function that attends by the operation where that computes the same, else as its own does."""
    heeded = _heeded(own)

    def attend(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, *rest: Any, **options: Any
    ) -> tuple[Tensor, Any]:
        plain = attention_mask is None and not rest and _are_causal(module, options, heeded)
        if plain and _are_taken(module, query, key, value):
            scaling = options.get("scaling")
            scale = query.shape[3] ** -0.5 if scaling is None else scaling
            if is_better(query, key, value, scale):
                return causal_attention(query, key, value, scale).transpose(1, 2), None
        found: tuple[Tensor, Any] = own(module, query, key, value, attention_mask, *rest, **options)
        return found

    return attend


@functools.cache
def _heeded(function: Any) -> frozenset[str]:
    """Return the options beyond those understood that a function may look at: its parameters, and words it holds."""
    code = function.__code__
    words = (c for c in code.co_consts if isinstance(c, str))
    return frozenset((*code.co_varnames[: code.co_argcount + code.co_kwonlyargcount], *words)) - UNDERSTOOD


def _are_causal(module: Any, options: dict[str, Any], heeded: frozenset[str]) -> bool:
    """Say whether options ask for causal attention without dropout, and for nothing else."""
    scaling, causal = options.get("scaling"), options.get("is_causal")
    return (
        (getattr(module, "is_causal", True) if causal is None else causal) is True
        and options.get("dropout", 0.0) == 0
        and (scaling is None or (isinstance(scaling, (int, float)) and -LARGEST <= scaling <= LARGEST))
        and all(value is None or value is False for name, value in options.items() if name in heeded)
    )


def _are_taken(module: Any, query: Any, key: Any, value: Any) -> bool:
    """Say whether the operation takes these as they are now, and the module's own function would, in groups as many.

    Not where PyTorch was told to attend in another way than by what it would choose.
    """
    return (
        F.scaled_dot_product_attention is SDPA
        and torch.backends.cuda.flash_sdp_enabled()
        and alike(query, key, value)
        and fit_together(query, key, value)
        and query.shape[1] == key.shape[1] * getattr(module, "num_key_value_groups", 1)
        and query.shape[0] > 0
        and query.shape[2] > 1
    )


def _rotating(own: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return a function that rotates by the operation where that computes the same, else as its own does."""

    def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        plain = not rest and not options and fits(q, k, cos, sin) and not (cos.requires_grad or sin.requires_grad)
        if plain and are_heads(q, cos, sin) and are_heads(k, cos, sin):
            return rotary(q, cos, sin), rotary(k, cos, sin)
        found: tuple[Tensor, Tensor] = own(q, k, cos, sin, *rest, **options)
        return found

    return rotated


def _with_others(forward: Any, asks: bool, rotation: Any) -> Callable[..., Any]:
    """Return a forward that runs the operations where it called other functions; no other model sees any of it."""
    # Python keeps which warnings it has given there, and makes it where it is not
    forward.__globals__.setdefault("__warningregistry__", {})
    names = dict(forward.__globals__)
    # another function may have been put in its place
    if rotation is not None and names.get(ROTATION) is rotation:
        names[ROTATION] = _rotating(rotation)
    if asks and (attend := sdpa_forward()) is not None:
        names[REGISTRY] = _Registry(names[REGISTRY], attend)
    made = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made
