"""bitsandbytes' 4-bit state dict: read and written.

    weight                                  uint8 [(n + 1) // 2, 1], packed codes
    weight.absmax                           float32, or uint8 where nested
    weight.quant_map                        float32 [16]
    weight.nested_absmax                    float32                         where nested
    weight.nested_quant_map                 float32 [256]                   where nested
    weight.quant_state.bitsandbytes__nf4    a JSON object as uint8 bytes: quant_type, blocksize, dtype, shape, and
                                            where nested nested_blocksize, nested_dtype, nested_offset

Source: bitsandbytes 0.50, QuantState.as_dict(packed=True).
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_core.dtypes import FLOATS
from lora_core.errors import CheckpointError, ConfigError
from lora_core.quant.blockwise import BLOCK_SIZES
from lora_core.quant.codebook import codebook
from lora_core.quant.double import dequantize_absmax

if TYPE_CHECKING:
    from lora_core.quant.weight import QuantizedWeight

# keys of what a weight does not hold but can say: level maps, and, up to the first dot, its state as text
MAPS, STATE = ("quant_map", "nested_quant_map"), "quant_state"
STATE_KEY = f"{STATE}.bitsandbytes__"
# the uniform codebook is this project's own, under a key that bitsandbytes does not take for one of its own
OWN_STATE_KEY = f"{STATE}.lora_core__"
SHARED_TYPES = ("nf4", "fp4")
LONGEST_SHOWN = 60


def write(weight: "QuantizedWeight", prefix: str) -> dict[str, Tensor]:
    """Return the state dict of a weight under prefix.

    Raises:
        ConfigError: for a codebook that bitsandbytes does not have, or a prefix that is no string.
    """
    _check_prefix(prefix)
    if weight.quant_type not in SHARED_TYPES:
        raise ConfigError(
            f"bitsandbytes has no {weight.quant_type!r}: want {' or '.join(SHARED_TYPES)}; requantise, or save with "
            "state_dict()"
        )
    return {f"{prefix}.{k}" if k else prefix: v for k, v in entries(weight).items()}


def entries(weight: "QuantizedWeight") -> dict[str, Tensor]:
    """Return the tensors of a weight by suffix; the packed codes have the suffix ""."""
    about: dict[str, Any] = {
        "quant_type": weight.quant_type,
        "blocksize": weight.block_size,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    found = {"": weight.codes, "absmax": weight.absmax, "quant_map": codebook(weight.quant_type).levels}
    if weight.nested_absmax is not None and weight.nested_offset is not None:
        found |= {"nested_absmax": weight.nested_absmax, "nested_quant_map": codebook("dynamic").levels}
        offset = 0.0 if weight.is_meta else weight.nested_offset.item()
        about |= {"nested_blocksize": weight.nested_block_size, "nested_dtype": "float32", "nested_offset": offset}
    key = STATE_KEY if weight.quant_type in SHARED_TYPES else OWN_STATE_KEY
    text = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8, device="cpu")
    # on the meta device nothing has values, and neither has this
    device = weight.device
    tensors = {k: v.detach().to(device) for k, v in {**found, key + weight.quant_type: text}.items()}
    # safetensors takes no two tensors that share memory, as those of two weights would
    return {k: v.clone() if k.endswith("quant_map") else v for k, v in tensors.items()}


def read(state: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """Return the arguments of QuantizedWeight that a state dict describes.

    Raises:
        CheckpointError: if keys are missing, sizes disagree, or quant_map is not the type's codebook. Scales that
            another nested map has quantised are read, and held in float32.
        ConfigError: if state is no mapping, or prefix no string.
    """
    _check_prefix(prefix)
    if not isinstance(state, Mapping):
        raise ConfigError(
            f"from_bitsandbytes: the state is a {type(state).__name__}; want a mapping of names to tensors, such as "
            "safetensors.torch.load_file returns"
        )
    mine = {
        k.removeprefix(prefix).removeprefix("."): v
        for k, v in state.items()
        if isinstance(k, str) and (k == prefix or k.startswith(prefix + "."))
    }
    for key, tensor in mine.items():
        if isinstance(tensor, Tensor) and tensor.is_meta:
            raise CheckpointError(
                f"{_full(prefix, key)} is on the meta device and has no values: load the file's own tensors"
            )
    about = _about(mine, prefix)
    kind, block_size, shape = about["quant_type"], about["blocksize"], torch.Size(about["shape"])
    codes, absmax, levels = (_tensor(mine, key, prefix) for key in ("", "absmax", "quant_map"))
    if about.get("packing_format_for_cpu") or _looks_repacked(codes, absmax):
        raise CheckpointError(
            f"{prefix}: these bytes were repacked for CPU inference, which loses the nested scales; save the model "
            "before its first forward in eval mode, or from a GPU"
        )
    if not torch.equal(levels.float().cpu(), codebook(kind).levels):
        raise CheckpointError(f"{prefix}.quant_map is not the {kind} codebook; want the levels of bitsandbytes' {kind}")
    n = shape.numel()
    blocks = -(-n // block_size)
    codes = _bytes(codes, prefix).reshape(-1, 1)
    _check_size(f"{prefix} (shape {tuple(shape)})", codes, -(-n // 2))
    _check_size(f"{prefix}.absmax (shape {tuple(shape)}, blocksize {block_size})", absmax, blocks)
    found = {
        "codes": codes,
        "absmax": absmax.reshape(-1),
        "nested_absmax": None,
        "nested_offset": None,
        "shape": shape,
        "dtype": getattr(torch, about["dtype"]),
        "quant_type": kind,
        "block_size": block_size,
    }
    if "nested_offset" in about:
        found |= _nested(mine, about, found["absmax"], prefix)
    elif absmax.dtype != torch.float32:
        raise CheckpointError(f"{prefix}.absmax is {absmax.dtype}; want torch.float32 where it is not nested")
    for key, tensor in found.items():
        if isinstance(tensor, Tensor) and tensor.device != codes.device:
            raise CheckpointError(
                f"{prefix}: {key} is on {tensor.device}, the codes on {codes.device}: want one device"
            )
    return found


def _check_prefix(prefix: Any) -> None:
    if not isinstance(prefix, str):
        raise ConfigError(f"prefix is {prefix!r}; want a string, the key of the packed codes")


def keys(quant_type: str, nested: bool) -> set[str]:
    """Return the suffixes that a weight has in a state dict, the packed codes' left out."""
    state = (STATE_KEY if quant_type in SHARED_TYPES else OWN_STATE_KEY) + quant_type
    return {"absmax", "quant_map", state, *(("nested_absmax", "nested_quant_map") if nested else ())}


def _nested(mine: dict[str, Tensor], about: dict[str, Any], absmax: Tensor, prefix: str) -> dict[str, Any]:
    scales = _tensor(mine, "nested_absmax", prefix).reshape(-1).float()
    levels = _tensor(mine, "nested_quant_map", prefix).reshape(-1).float()
    size = about["nested_blocksize"]
    if absmax.dtype != torch.uint8:
        raise CheckpointError(f"{prefix}.absmax is {absmax.dtype}; want torch.uint8 where it is nested")
    _check_size(f"{prefix}.nested_absmax (nested_blocksize {size})", scales, -(-absmax.numel() // size))
    _check_size(f"{prefix}.nested_quant_map", levels, 256)
    offset = torch.tensor(about["nested_offset"] if absmax.numel() else 0.0, dtype=torch.float32, device=absmax.device)
    if not torch.equal(levels.cpu(), codebook("dynamic").levels):
        # an 8-bit map of another making: the scales are decoded with it, exactly, and kept in float32
        return {"absmax": dequantize_absmax(absmax, scales, offset, size, levels)}
    return {"nested_absmax": scales, "nested_offset": offset, "nested_block_size": size}


def _looks_repacked(codes: Tensor, absmax: Tensor) -> bool:
    """Say whether bitsandbytes laid a weight out for its CPU product: rows of codes, and scales by block and row.

    Its state dict does not say so. Source: bitsandbytes 0.50, _convert_weight_packed_for_cpu.
    """
    return absmax.dim() == 2 or (codes.dim() == 2 and codes.shape[1] > 1)


def _is_count(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < 2**63


# what the JSON object has to say, as a test and in words
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "quant_type": (lambda v: v in ("nf4", "fp4", "int4"), "nf4 or fp4, or this library's int4"),
    "blocksize": (lambda v: type(v) is int and v in BLOCK_SIZES, f"one of {BLOCK_SIZES}"),
    "dtype": (
        lambda v: isinstance(v, str) and getattr(torch, v, None) in FLOATS,
        ", ".join(str(d).removeprefix("torch.") for d in FLOATS),
    ),
    "shape": (
        lambda v: isinstance(v, list) and all(_is_count(side, 0) for side in v) and math.prod(v) < 2**63,
        "a list of whole numbers",
    ),
    "nested_blocksize": (lambda v: _is_count(v, 1), "a whole number of at least 1"),
    "nested_offset": (
        lambda v: type(v) in (int, float) and abs(v) <= torch.finfo(torch.float32).max,
        "a finite number",
    ),
}


def _about(mine: dict[str, Tensor], prefix: str) -> dict[str, Any]:
    """Return the JSON object, checked to have what a weight needs."""
    keys = [k for k in mine if k.startswith((STATE_KEY, OWN_STATE_KEY))]
    if not keys:
        got = ", ".join(f"{prefix}.{k}" if k else prefix for k in mine) or "none"
        raise CheckpointError(
            f"no 4-bit state under {prefix!r}: want {prefix}.{STATE_KEY}nf4 beside the packed weight; the keys that "
            f"start so are: {got}"
        )
    try:
        about = json.loads(bytes(_tensor(mine, keys[0], prefix).cpu().to(torch.uint8).tolist()))
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{prefix}.{keys[0]} is no JSON text: {error}; the file is damaged") from None
    wanted = {"quant_type", "blocksize", "dtype", "shape"}
    if isinstance(about, dict) and "nested_offset" in about:
        wanted |= {"nested_blocksize", "nested_offset"}
    missing = sorted(wanted - set(about if isinstance(about, dict) else ()))
    if missing:
        raise CheckpointError(f"{prefix}.{keys[0]} does not say {', '.join(missing)}; the file is damaged")
    # of no scales at all bitsandbytes' mean is NaN
    unread = {"nested_offset"} if isinstance(about["shape"], list) and 0 in about["shape"] else set()
    for name in sorted(wanted - unread):
        sound, words = FIELDS[name]
        if not sound(about[name]):
            raise CheckpointError(
                f"{prefix}.{keys[0]}: {name} {_short(about[name])}; want {words}: the file is damaged, or of another "
                "format"
            )
    return about


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "..."


def _tensor(mine: dict[str, Tensor], key: str, prefix: str) -> Tensor:
    if not isinstance(mine.get(key), Tensor):
        raise CheckpointError(f"{_full(prefix, key)} is missing beside {prefix}, or no tensor")
    if mine[key].layout != torch.strided:
        raise CheckpointError(f"{_full(prefix, key)} is of layout {mine[key].layout}; want a dense tensor")
    return mine[key].detach()


def _full(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if key else prefix


def _bytes(codes: Tensor, prefix: str) -> Tensor:
    """Return packed codes as uint8: bitsandbytes may store them in the bytes of another dtype (quant_storage)."""
    if codes.dtype == torch.uint8:
        return codes
    try:
        return codes.contiguous().view(-1).view(torch.uint8)
    except RuntimeError:
        raise CheckpointError(f"{prefix} is {codes.dtype}; want packed bytes, torch.uint8") from None


def _check_size(what: str, tensor: Tensor, wanted: int) -> None:
    if tensor.numel() != wanted:
        raise CheckpointError(f"{what} has {tensor.numel()} elements, want {wanted}: the file is damaged or truncated")
