"""Registers the fast paths, once per process: CPU ones always, Triton kernels where PyTorch is built for CUDA.

Dispatch is PyTorch's own: an op's default body is the reference, and a fast path registers itself for a device type
when its module is imported. A kernel's module is imported at its operation's first call. Whether there is a GPU is not
asked before: the answer would start CUDA, after which a process cannot be forked, nor its devices be chosen.
"""

import functools
import importlib
import importlib.util
import pkgutil
import threading
import warnings
from typing import Any

# what the files of lora_core/ops call the operations they define
OPERATIONS = ("op", "backward_op", "nf4_op")


def load() -> None:
    """Register every implementation this installation can run; the kernels are imported when first called."""
    # operations without a file in lora_core/cpu, which imports the others
    import lora_core.ops.absmax_quantize
    import lora_core.ops.dora_norm  # noqa: F401

    _import_all("lora_core.cpu")
    if _why_not_installed() is None:
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
                register(operation, device_type, functools.partial(_first_call, name, operation, device_type))


def _first_call(name: str, operation: Any, device_type: str, *args: Any, **kwargs: Any) -> Any:
    if why_not_launched() is None:
        # the file registers its launch functions in place of this one
        importlib.import_module(f"lora_core.kernels.{name}")
    else:
        from lora_core.ops.eager import unregister

        unregister(operation, device_type)
    return operation(*args, **kwargs)


def why_not_launched() -> str | None:
    """Return why Triton cannot launch anything on this machine's GPU, or None where it can; warn once if not.

    The first launch of a process builds a small library in C, unless Triton has it in its cache.
    """
    with _one_tries:
        return _tried()


# a cache alone lets two threads try at once
_one_tries = threading.Lock()


@functools.cache
def _tried() -> str | None:
    try:
        from triton.runtime.driver import driver

        driver.active.utils  # noqa: B018
    except Exception as failure:
        why = f"Triton cannot build what launches its kernels ({type(failure).__name__}: {failure})"
        warnings.warn(
            f"{why}: on this GPU every operation runs by the reference, which is slower. Triton takes a C compiler and "
            "Python's headers: on Debian or Ubuntu, apt-get install gcc python3-dev. lora-core doctor says what runs.",
            RuntimeWarning,
            stacklevel=2,
        )
        return why
    return None


def why_no_kernels() -> str | None:
    """Return why the Triton kernels do not run on this machine, or None where they do."""
    import torch

    why = _why_not_installed()
    if why is None and not torch.cuda.is_available():
        why = "there is no GPU"
    return why_not_launched() if why is None else why


def _why_not_installed() -> str | None:
    """Return why the kernels are not registered, or None where they are."""
    import torch

    if torch.version.cuda is None:
        # ROCm's tensors are of type "cuda", too, and the kernels are written for NVIDIA's processors
        return f"this PyTorch, {torch.__version__}, is not built for CUDA"
    if not _is_there("triton"):
        return "Triton is not installed"
    return None if _is_there("lora_core.kernels") else "lora_core.kernels is not installed"


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
