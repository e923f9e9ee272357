"""Finding and replacing modules inside a model."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lora_core.adapt.kinds import has_pefts_adapter
from lora_core.errors import AdapterError, ConfigError
from lora_core.layers.adapter import AdapterLayer
from lora_core.layers.trainable_copy import TrainableCopy
from lora_core.quant.blockwise import has_values

# the child that holds a module inside the wrapper of torch.compile, of activation checkpointing and of FSDP
COMPILED = "_orig_mod"
WRAPPED = (COMPILED, "_checkpoint_wrapped_module", "_fsdp_wrapped_module")

# what keeps the processes of a training together, by the parameters that are there when it is put around a module
SYNCHRONISED = frozenset(("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"))


def plain_name(name: str) -> str:
    """Return a module's name without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED) if "_" in name else name


def check_module(model: Any) -> None:
    """Raise ConfigError if a model is none."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}; want a torch.nn.Module")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of compiling, averaging and parallelism, whose names no checkpoint has.

    Raises:
        ConfigError: if this is no module.
    """
    check_module(model)
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)):
            model = model.module
            continue
        inside = next((child for name, child in model.named_children() if name in WRAPPED), None)
        if inside is None:
            return model
        model = inside


def refuse_wrapped(model: nn.Module, verb: str) -> None:
    """Raise AdapterError where PyTorch would not synchronise a new parameter: it has counted them when it wrapped."""
    for name, module in model.named_modules():
        kind = _synchroniser(module)
        if kind is not None:
            raise AdapterError(
                f"cannot {verb}: {name or 'the model'} is wrapped by {kind}, which does not synchronise parameters "
                "that come later: each process would train its own; add adapters first, then wrap"
            )


def _synchroniser(module: nn.Module) -> str | None:
    return next((base.__name__ for base in type(module).__mro__ if base.__name__ in SYNCHRONISED), None)


def shared_out(model: nn.Module) -> None:
    """Have what fully_shard made whole for a forward be every process's share again: what is written there is lost."""
    for module in model.modules():
        if _synchroniser(module) == "FSDPModule":
            owner: Any = module
            owner.reshard()


def named_modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Return model.named_modules(); raise ConfigError, at once, if there is no model."""
    check_module(model)
    modules: Iterator[tuple[str, nn.Module]] = model.named_modules()
    return modules


def parts(model: nn.Module) -> dict[str, AdapterLayer | TrainableCopy]:
    """Return all that adapters have put into a model, by module name."""
    return {name: m for name, m in named_modules(model) if isinstance(m, (AdapterLayer, TrainableCopy))}


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """Return the adapted layers of a model by module name."""
    return {name: m for name, m in named_modules(model) if isinstance(m, AdapterLayer)}


def layers_of(model: nn.Module, *adapter_names: str) -> dict[str, AdapterLayer]:
    """Return the layers that one of these adapters, or several, adapts, by module name."""
    return {n: m for n, m in adapter_layers(model).items() if any(a in m.adapters for a in adapter_names)}


def trainable_copies(model: nn.Module) -> dict[str, TrainableCopy]:
    """Return the modules trained whole (modules_to_save) by module name."""
    return {name: m for name, m in named_modules(model) if isinstance(m, TrainableCopy)}


def original_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules below a model that were there before any adapter, with their names.

    An adapted layer and a trainable copy stand for what they replaced: nothing inside them is yielded. A wrapper is
    not, what it wraps is, its only child.
    """
    # a module's own come right behind it
    inside: str | None = None
    for name, module in model.named_modules():
        if not name or (inside is not None and name.startswith(inside)) or _is_wrapper(module):
            continue
        yield name, module
        inside = f"{name}." if isinstance(module, (AdapterLayer, TrainableCopy)) else inside


def _is_wrapper(module: nn.Module) -> bool:
    return len(module._modules) == 1 and next(iter(module._modules)) in WRAPPED


def outermost(names: Iterable[str]) -> list[str]:
    """Return the names, given in a model's order, that are not inside another of them."""
    found: list[str] = []
    for name in names:
        if not found or not name.startswith(f"{found[-1]}."):
            found.append(name)
    return found


def stated_embeddings(model: nn.Module, side: str) -> nn.Module | None:
    """Return the "input" or "output" embeddings that a transformers model says it has; None where it says none."""
    get = getattr(model, f"get_{side}_embeddings", None)
    try:
        found = get() if callable(get) else None
    except NotImplementedError:
        # a model of images or sound has no tokens
        return None
    return found if isinstance(found, nn.Module) else None


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of the adapters a model has; those of one module in the order they were added."""
    return list(dict.fromkeys(name for part in parts(model).values() for name in part.adapters))


def require_adapters(model: nn.Module, names: Iterable[str]) -> None:
    """Raise AdapterError unless the model has every one of these adapters."""
    have = adapter_names(model)
    missing = [name for name in names if name not in have]
    if missing:
        others = any(map(has_pefts_adapter, model.modules()))
        advice = "it has PEFT's, for which PEFT has verbs" if others else "add it with add_adapter or load_adapter"
        raise AdapterError(f"no adapter named {missing[0]!r}: the model has {have or 'none'}; {advice}")


def merged_names(model: nn.Module) -> tuple[str, ...]:
    """Return the adapters that are inside the weights."""
    return next((part.merged.names for part in parts(model).values() if part.merged), ())


def require_editable(model: nn.Module, verb: str) -> None:
    """Raise AdapterError if an adapter is merged into the weights, or adapters are disabled for a while."""
    merged = merged_names(model)
    if merged:
        raise AdapterError(
            f"cannot {verb} while {list(merged)} is merged into the weights: call unmerge_adapter(model) first"
        )
    if any(part.off.blocks for part in parts(model).values()):
        raise AdapterError(f"cannot {verb} while adapters are disabled: do it outside the disable_adapter block")


def places(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return every module with all the names it is reached by; a module used twice has two."""
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(module, []).append(name)
    return found


def replace(model: nn.Module, names: Iterable[str], new: nn.Module) -> None:
    """Put a module at each of these names."""
    for name in names:
        parent, _, child = name.rpartition(".")
        owner: Any = model.get_submodule(parent)
        setattr(owner, child, new)
        if child == COMPILED and type(owner).__module__.startswith("torch._dynamo."):
            # it calls what it was made around
            owner._initialize()


class Ties:
    """Which parameters of a model share their memory with another's: one object, or two over the same numbers."""

    def __init__(self, model: nn.Module) -> None:
        self._owners: dict[object, list[str]] = {}
        for name, module in model.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    self._owners.setdefault(_memory(parameter), []).append(f"{name}.{key}" if name else key)

    def of(self, parameter: Any) -> list[str]:
        """Return the full names under which this parameter is owned, if more than one module owns it."""
        names = self._owners.get(_memory(parameter), []) if isinstance(parameter, Tensor) else []
        return names if len(names) > 1 else []


def _memory(parameter: Tensor) -> object:
    """Return what two parameters have in common if a change of one changes the other."""
    if not has_values(parameter):
        return id(parameter)
    try:
        # a tensor that wraps others has no memory of its own: 0, or an error
        pointer = parameter.data_ptr()
    except RuntimeError:
        pointer = 0
    return (parameter.device, pointer) if pointer else id(parameter)
