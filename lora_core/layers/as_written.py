"""Whether calling a module means the forward that its class was written with."""

from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# forwards that compute nn.Linear's formula in other words, by module and name
LINEAR_TOO = frozenset({("transformers.models.falcon.modeling_falcon", "FalconLinear.forward")})


def stands_for_others(weight: Any) -> bool:
    """Say whether a weight is of a tensor class that wraps other tensors, as torchao's: its own forward knows how."""
    return weight is not None and is_traceable_wrapper_subclass(weight)


def is_sharded(weight: Any) -> bool:
    """Say whether processes hold a part of a weight each: fully_shard makes it whole for a forward."""
    return type(weight).__module__.startswith("torch.distributed.") and type(weight).__name__ == "DTensor"


def runs_as_written(module: nn.Module, forward: Any) -> bool:
    """Say whether calling module means calling this forward: no subclass, hook or patch stands between."""
    kind = written_class(module)
    return (
        (kind.forward is forward or (forward is nn.Linear.forward and _is_linear_too(kind.forward)))
        and not is_patched(module)
        and not _has_any_global_hook()
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and (type(weight := module._parameters.get("weight")) is nn.Parameter or not stands_for_others(weight))
    )


def written_class(module: nn.Module) -> Any:
    """Return the class a module was written with: one that fuse made computes what the one it was made from does."""
    return getattr(type(module), "fused_from", type(module))


def _is_linear_too(forward: Any) -> bool:
    return (getattr(forward, "__module__", ""), getattr(forward, "__qualname__", "")) in LINEAR_TOO


def is_patched(module: nn.Module) -> bool:
    """Say whether a forward lies on the module itself; its class's own, which hooks leave behind, is no patch."""
    own: Any = module.__dict__.get("forward")
    return own is not None and not (
        getattr(own, "__self__", None) is module and getattr(own, "__func__", None) is type(module).forward
    )
