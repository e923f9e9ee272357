"""In which forms a kernel is compiled: what each takes for granted of sizes, strides and addresses.

Triton compiles a kernel anew for every set of arguments that are 1 and of arguments that are multiples of 16, more
sets than anyone can look through. A form names one set, and leaves open all that is not in it; a launch takes the form
whose set holds. What a kernel can be launched in is then what its file lists.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

# bytes, or elements, that addresses and sizes are multiples of where 16 bytes are loaded at once
ALIGNMENT = 16
# what is read number by number, wherever it lies
ANYWHERE = ("seed_ptr", "offset_ptr", "nested_offset_ptr", "scaling_ptr", "bias_ptr")


@dataclass(frozen=True)
class Form:
    """One form of a kernel.

    Args:
        kernel: what @triton.jit makes of it.
        ones: arguments that are 1.
        aligned: arguments that are multiples of 16.
        addresses: pointers to what begins at a multiple of 16 bytes.
    """

    kernel: Any
    ones: tuple[str, ...] = ()
    aligned: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        """Return what launches so many programs."""
        return self.kernel[grid]


def form(
    kernel: Callable[..., Any], ones: tuple[str, ...] = (), aligned: tuple[str, ...] = (), addresses: bool = False
) -> Form:
    """Return a form of a kernel, given as it is written; without more, one that takes nothing for granted.

    Args:
        kernel: the function.
        ones: arguments that are 1.
        aligned: arguments that are multiples of 16.
        addresses: whether all that is read in rows begins at a multiple of 16 bytes.
    """
    parameters = inspect.signature(kernel).parameters
    names = [name for name, parameter in parameters.items() if parameter.annotation is not tl.constexpr]
    pointers = tuple(n for n in names if n.endswith("_ptr") and n not in ANYWHERE) if addresses else ()
    taken = {*ones, *aligned, *pointers}
    return Form(triton.jit(do_not_specialize=[n for n in names if n not in taken])(kernel), ones, aligned, pointers)


def begins_aligned(*tensors: Tensor | None) -> bool:
    """Say whether all of these begin at a multiple of 16 bytes."""
    return not any(t is not None and t.data_ptr() % ALIGNMENT for t in tensors)


def in_wide_loads(t: Tensor, unit: int = 1) -> bool:
    """Say whether a matrix can be loaded 16 bytes at once: dimension `unit` contiguous, all else a multiple of 16."""
    return t.stride(unit) == 1 and not (t.shape[unit] | t.stride(1 - unit) | t.data_ptr()) % ALIGNMENT
