"""Registers the fast paths, once per process: CPU ones always, Triton kernels where Triton and a GPU are there.

Dispatch is PyTorch's own: an op's default body is the reference, and a fast path registers itself for a device type
when its module is imported.
"""

import importlib
import importlib.util
import pkgutil
import sys


def load() -> None:
    """Import every module that registers an implementation this machine can run."""
    _import_all("lora_core.cpu")
    if kernels_can_run():
        _import_all("lora_core.kernels")


def kernels_can_run() -> bool:
    """Say whether the Triton kernels are here, with Triton and a GPU to run them."""
    import torch

    found = importlib.util.find_spec("lora_core.kernels") and importlib.util.find_spec("triton")
    return found is not None and torch.cuda.is_available()


def _import_all(package: str) -> None:
    spec = importlib.util.find_spec(package)
    for path in (spec.submodule_search_locations or []) if spec else []:
        for module in pkgutil.iter_modules([path]):
            importlib.import_module(f"{package}.{module.name}")


def implementation(op: str, device_type: str) -> str:
    """Return the module whose code runs an op on this type of device; "reference" where no fast path is loaded.

    Args:
        op: its name without the namespace, such as "nf4_dequantize". A fast path lives in a file of that name, an
            op's backward beside its forward.
        device_type: "cpu" or "cuda".
    """
    package = {"cpu": "lora_core.cpu", "cuda": "lora_core.kernels"}.get(device_type, "")
    module = f"{package}.{op.removesuffix('_backward')}"
    return module if module in sys.modules else "reference"
