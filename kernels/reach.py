"""What the kernels leave to the reference, and what is copied first: float64, old processors, sizes past their reach.

Triton compiles a kernel anew for every set of arguments that take 64 bits. None do: from 2^30 on tokens go to the
reference and strides are copied away, which leaves room to step past an end. A grid's second and third dimension end at
65535, in programs of 16 ranks at least: larger sides go to the reference, too. How many elements there are, and where
they lie, is counted in 64 bits.

Operations without products of matrices have programs in one dimension alone: only more than 2^30 of them go there.

Before compute capability 8.0 Triton multiplies half precision without tensor cores, and tiles made for them spill their
sums: a library's products are faster there.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from lora_core.kernels.log import log_launch

# tokens, or a stride, at most
LARGEST = 2**30 - 1
HALVES = (torch.float16, torch.bfloat16)
# the compute capability from which on Triton uses tensor cores
TENSOR_CORES = (8, 0)
# rows and columns of W, A and B at most
LARGEST_SIDE = 16 * 65535

P = ParamSpec("P")
T = TypeVar("T")


def left_to_reference(operation: str, tokens: Tensor, *matrices: Tensor, sides: Sequence[int] = ()) -> bool:
    """Say whether the reference has to take an operation, and say at level DEBUG why.

    Args:
        operation: its name.
        tokens: x or dL/dy, shape [M, ...].
        matrices: W, A and B, of any number of layers.
        sides: sizes of what is made of them.
    """
    if any(t.dtype == torch.float64 for t in (tokens, *matrices)):
        why = "float64"
    elif any(t.dtype in HALVES for t in (tokens, *matrices)) and not _multiplies_halves(tokens.device):
        why = f"products in half precision before compute capability {TENSOR_CORES[0]}.{TENSOR_CORES[1]}"
    elif len(tokens) > LARGEST:
        why = f"more than {LARGEST} tokens"
    elif max(*sides, *(size for t in matrices for size in t.shape)) > LARGEST_SIDE:
        why = f"a side of more than {LARGEST_SIDE}"
    else:
        return False
    log_launch(operation, f"{why}, reference")
    return True


def past_reach(operation: str, like: Tensor, *counts: int) -> bool:
    """Say whether the reference has to take an operation without products of matrices, and say at level DEBUG why.

    Args:
        operation: its name.
        like: an operand, of which the dtype counts.
        counts: sizes, and programs, that a kernel counts in 32 bits.
    """
    if like.dtype == torch.float64:
        why = "float64"
    elif max(counts, default=0) > LARGEST:
        why = f"a count of more than {LARGEST}"
    else:
        return False
    log_launch(operation, f"{why}, reference")
    return True


@functools.cache
def _multiplies_halves(device: torch.device) -> bool:
    """Say whether Triton uses this device's tensor cores; the interpreter has no use for any."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= TENSOR_CORES


def near(launch: Callable[P, T]) -> Callable[P, T]:
    """Let a launch copy those of its tensors first whose elements lie too far apart."""

    @functools.wraps(launch)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if any(map(_is_far, args)):
            log_launch(launch.__name__, "copies what lies far apart")
            args = tuple(map(_brought_near, args))  # type: ignore[assignment]
        return launch(*args, **kwargs)

    return run


def _is_far(value: Any) -> bool:
    if isinstance(value, Tensor):
        # of more dimensions than two, those of one element are gone once flattened
        sizes = zip(value.shape, value.stride(), strict=True)
        return any(step > LARGEST and (size > 1 or value.dim() == 2) for size, step in sizes)
    return isinstance(value, list | tuple) and any(map(_is_far, value))


def _brought_near(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone(memory_format=torch.contiguous_format) if _is_far(value) else value
    return type(value)(map(_brought_near, value)) if isinstance(value, list | tuple) and _is_far(value) else value
