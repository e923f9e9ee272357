"""Registers the fast paths, once per process: CPU ones always, Triton kernels where Triton and a GPU are there.

Dispatch is PyTorch's own: an op's default body is the reference, and a fast path registers itself for a device type
when its module is imported. A kernel's module is imported at its operation's first call.
"""

import functools
import importlib
import importlib.util
import pkgutil
from typing import Any

# what the files of lora_core/ops call the operations they define
OPERATIONS = ("op", "backward_op", "nf4_op")


def load() -> None:
    """Register every implementation this machine can run; the kernels are imported when first called."""
    _import_all("lora_core.cpu")
    if kernels_can_run():
        defer_kernels("cuda")


def defer_kernels(device_type: str) -> None:
    """Register, for each operation with a kernel file, a first call that imports it: importing Triton takes long."""
    from lora_core.ops.eager import register

    for name in _modules("lora_core.kernels"):
        if importlib.util.find_spec(f"lora_core.ops.{name}") is None:
            continue
        operations = importlib.import_module(f"lora_core.ops.{name}")
        for operation in (operations.__dict__.get(attribute) for attribute in OPERATIONS):
            if operation is not None:
                register(operation, device_type, functools.partial(_first_call, name, operation))


def _first_call(name: str, operation: Any, *args: Any, **kwargs: Any) -> Any:
    # the file registers its launch functions in place of this one
    importlib.import_module(f"lora_core.kernels.{name}")
    return operation(*args, **kwargs)


def kernels_can_run() -> bool:
    """Say whether the Triton kernels are here, with Triton and a GPU to run them."""
    import torch

    return torch.cuda.is_available() and _is_there("lora_core.kernels") and _is_there("triton")


def _is_there(module: str) -> bool:
    """Say whether a module can be found; one whose import somebody refuses or blocks is not there."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _import_all(package: str) -> None:
    for name in _modules(package):
        importlib.import_module(f"{package}.{name}")


def _modules(package: str) -> list[str]:
    spec = importlib.util.find_spec(package)
    places = (spec.submodule_search_locations or []) if spec else []
    return [module.name for place in places for module in pkgutil.iter_modules([place])]


def implementation(op: str, device_type: str) -> str:
    """Return the module whose code runs an op on this type of device; "reference" where no fast path is loaded.

    Args:
        op: its name without the namespace, such as "nf4_dequantize".
        device_type: "cpu" or "cuda".
    """
    from lora_core.ops.eager import registered

    found = registered(f"lora_core::{op}", device_type)
    if found is None:
        return "reference"
    if isinstance(found, functools.partial):
        # a first call, which will import the file it is made for
        return f"lora_core.kernels.{found.args[0]}"
    return found.__module__
