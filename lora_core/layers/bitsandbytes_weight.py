"""Reading the weight of a bitsandbytes Linear4bit where it lies: the same bytes, no copy.

bitsandbytes is not imported: a layer is given by whoever found it. Source: bitsandbytes 0.50, QuantState.
"""

from typing import Any

import torch

from lora_core.ops.packed import Packed
from lora_core.quant.blockwise import BLOCK_SIZES
from lora_core.quant.codebook import codebook
from lora_core.quant.double import NESTED_BLOCK_SIZE


def quant_state(layer: Any) -> Any:
    """Return the QuantState of a Linear4bit, or None before it is quantised."""
    state = getattr(layer.weight, "quant_state", None)
    # a parameter made anew, by FSDP for one, has lost its own
    return state if state is not None else getattr(layer, "quant_state", None)


def why_unreadable(layer: Any) -> str | None:
    """Return why packed_weight cannot read this layer, or None. Compares level maps, so it waits for the device."""
    state = quant_state(layer)
    if state is None:
        return "it is not quantised yet: move it to its device first"
    if state.quant_type != "nf4":
        return f"its quant_type is {state.quant_type!r}: want 'nf4'"
    if _repacked(state):
        return "its bytes were repacked for CPU inference: fuse before the first forward in eval mode"
    if state.blocksize not in BLOCK_SIZES:
        return f"its blocksize is {state.blocksize}: want one of {BLOCK_SIZES}"
    if not torch.equal(state.code.float().cpu(), codebook("nf4").levels):
        return "its quant_map is not the NF4 codebook"
    if state.state2 is not None and not torch.equal(state.state2.code.float().cpu(), codebook("dynamic").levels):
        return "its nested_quant_map is not the signed dynamic map"
    return None


def packed_weight(layer: Any) -> Packed | None:
    """Return the parts of a Linear4bit's weight, sharing its memory; None where they cannot be used as they are now."""
    state = quant_state(layer)
    if state is None or _repacked(state):
        return None
    # stored as another dtype, the bytes are the same
    codes = layer.weight.detach().reshape(-1).view(torch.uint8)
    nested = state.state2
    return Packed(
        codes,
        state.absmax,
        None if nested is None else nested.absmax,
        None if nested is None else state.offset,
        tuple(state.shape),
        state.blocksize,
        NESTED_BLOCK_SIZE if nested is None else nested.blocksize,
    )


def _repacked(state: Any) -> bool:
    return bool(getattr(state, "packing_format_for_cpu", False))
