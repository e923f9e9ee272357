"""bitsandbytes' Linear4bit, its weight read where it lies: the same bytes, no copy; and its output by one operation.

bitsandbytes is not imported: a layer is given by whoever found it. Source: bitsandbytes 0.50, QuantState.
"""

from typing import Any

import torch
from torch import Tensor

from lora_core.layers.adapter import beside
from lora_core.ops.checks import autocast_on
from lora_core.ops.nf4_lora_linear import packed_lora_linear
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
    codes = layer.weight.detach().reshape(-1)
    if codes.dtype != torch.uint8:
        # stored as another dtype, the bytes are the same
        codes = codes.view(torch.uint8)
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


def is_four_bit(base: Any) -> bool:
    """Say whether this is bitsandbytes' Linear4bit, which alone among linear layers packs its weight into a column."""
    return hasattr(base, "quant_state") and hasattr(base, "compute_type_is_set")


def four_bit(
    layer: Any,
    w: Any,
    x: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Return a Linear4bit's output with an adapter, in the dtypes that bitsandbytes would compute and return."""
    compute, bias, lora_a, lora_b = four_bit_operands(layer, x, lora_a, lora_b)
    return packed_lora_linear(x.to(compute), w, bias, lora_a, lora_b, scaling, dropout, seed).to(x.dtype)


def four_bit_operands(
    layer: Any, x: Tensor, lora_a: Tensor | None, lora_b: Tensor | None
) -> tuple[torch.dtype, Tensor | None, Any, Any]:
    """Return the dtype in which bitsandbytes would compute, and bias, A and B as the operation takes them then."""
    if not layer.compute_type_is_set:
        layer.set_compute_type(x)
        layer.compute_type_is_set = True
    compute: torch.dtype = x.dtype if layer.compute_dtype is None else layer.compute_dtype
    if lora_a is not None and lora_b is not None and not autocast_on(x):
        lora_a, lora_b = beside(compute, lora_a, lora_b)
    return compute, None if layer.bias is None else layer.bias.to(compute), lora_a, lora_b
