"""Stores that go past the caches, as LLVM's instructions.

A plain store first reads into a cache the line it is about to overwrite, and later another line has to leave for it. A
result that no cache holds until it is read is written at once, by whole lines: 32 MiB in bfloat16 were decoded in 3.1
ms instead of 4.6, the same weight in float32 in 3.6 instead of 7.8, into memory that the process had already, on two
cores of an Intel Xeon with AVX-512.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from lora_core.cpu.compiled.jit import compiled
from lora_core.cpu.compiled.pick import WORD

# bytes that are written at once, and of which an address has to be a multiple, or the processor faults
LINE = 64


def store(builder: Any, value: Any, data: Any, streamed: Any) -> None:
    """Write a vector of whole lines to a pointer, past the caches if `streamed`, which is a truth value at run time."""
    with builder.if_else(streamed) as (past, into):
        with past:
            hint = builder.module.add_metadata([ir.Constant(WORD, 1)])
            builder.store(value, data, align=LINE).set_metadata("nontemporal", hint)
        with into:
            builder.store(value, data, align=1)


@compiled
def starts_a_line(values: np.ndarray) -> bool:
    """Say whether an array begins where a line does."""
    return values.ctypes.data % LINE == 0


def _settle(_: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


# wait until what was streamed is there for other threads: unlike plain stores, these may pass what signals that
settle: Any = intrinsic(_settle)
