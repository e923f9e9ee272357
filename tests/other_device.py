"""A device that is not the CPU, for machines without a GPU: its tensors are the CPU's under a device type of their own.

As on a GPU, an operation on tensors of two devices is an error, and what was made without a device lies on the CPU. The
library's operations run the kernels written for CUDA, in Triton's interpreter, and are counted in `launched`. A process
that knows the device cannot forget it: a test that uses it starts one by `apart`.
"""

import importlib
import os
import pkgutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "elsewhere"
DEVICE = f"{NAME}:0"
FOLDER = Path(__file__).resolve().parent
# what may take tensors of two devices
MOVES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)

# the library's operations that have no kernel: PyTorch's own run in them
PLAIN = ("absmax_offset",)

launched: Counter[str] = Counter()
# a registration holds for as long as its library does
_libraries: list[torch.library.Library] = []


def apart(function: Callable[[Path], None], folder: Path) -> None:
    """Call a function of a test file, which ends in `run_named`, in a process of its own that has the device."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(FOLDER.parent)}
    command = [sys.executable, function.__code__.co_filename, function.__name__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def run_named(functions: dict[str, Any]) -> None:
    """Do what `apart` asks a process for."""
    set_up()
    functions[sys.argv[1]](Path(sys.argv[2]))
    # once in fifteen times the process was aborted at its end ("terminate called without an active exception"), most
    # likely as the interpreter ended autograd's thread for the device, inside C++, while it let go of a backward
    sys.stdout.flush()
    os._exit(0)


class Elsewhere(Tensor):
    """A tensor of the other device; `held` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Elsewhere":
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, device=DEVICE, **layout)

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __repr__(self, **_: object) -> str:
        return f"Elsewhere({self.held!r})"

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        made: Tensor = Elsewhere(self.held.detach().clone())
        if isinstance(self, nn.Parameter):
            made = nn.Parameter(made, requires_grad=self.requires_grad)
        memo[id(self)] = made
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        # a number alone may lie anywhere
        if func not in MOVES and any(value.dim() for value in given if not isinstance(value, cls)):
            raise RuntimeError(f"{func}: tensors of two devices")
        stays = kwargs.get("device") is None or torch.device(kwargs["device"]).type == NAME
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        same = {id(value.held): value for value in given if isinstance(value, cls)}
        result = _implementation(func)(*tree_map(_held, args), **tree_map(_held, kwargs))

        def moved(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return same[id(value)] if id(value) in same else cls(value)

        return tree_map(moved, result) if stays else result


def set_up() -> None:
    """Make the device known to PyTorch in this process, and the kernels to the device."""
    from lora_core import kernels

    module = _DummyBackendModule()
    # what recomputing activations asks a device for
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    _setup_privateuseone_for_python_backend(NAME, module)
    # a parameter is converted by making another one: this one's `held` would stay what it was
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    library = torch.library.Library("aten", "IMPL")
    for name, operation in _factories():
        library.impl(name, _made(operation), "PrivateUse1")
    library.impl("_copy_from", _copy, "PrivateUse1")
    _libraries.append(library)
    for module in pkgutil.iter_modules(kernels.__path__):
        importlib.import_module(f"lora_core.kernels.{module.name}")


def _held(value: Any) -> Any:
    return value.held if isinstance(value, Elsewhere) else value


def _implementation(func: Any) -> Callable[..., Any]:
    """Return what runs an operation on the tensors held: a kernel's launch for one of the library's own."""
    name = func._schema.name.removeprefix("lora_core::")
    if func.namespace != "lora_core" or name in PLAIN:
        return func
    from lora_core.ops import eager

    found = (run for (op, kind), run in eager._implementations.items() if kind == "cuda" and op._opoverload is func)
    launched[name] += 1
    return next(found)


def _factories() -> Iterator[tuple[str, Any]]:
    """Yield the operations that make a tensor of nothing but numbers."""
    for qualified in torch._C._dispatch_get_all_op_names():
        namespace, _, name = qualified.partition("::")
        if namespace != "aten":
            continue
        packet, _, overload = name.partition(".")
        try:
            operation = getattr(getattr(torch.ops.aten, packet), overload or "default")
        except (AttributeError, RuntimeError):
            continue
        takes = {argument.name: str(argument.type) for argument in operation._schema.arguments}
        makes = [str(value.type) for value in operation._schema.returns]
        if "device" in takes and not any("Tensor" in kind for kind in takes.values()) and makes == ["Tensor"]:
            yield name, operation


def _made(operation: Any) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: Elsewhere(operation(*args, **kwargs | {"device": "cpu"}))


def _copy(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _held(target).copy_(_held(source))
    return target
