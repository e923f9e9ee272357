"""Small Llamas with adapters of the same start in this library and in PEFT, on a dense and on an NF4 base.

bfloat16 on a GPU, float32 on a CPU. Takes transformers; PEFT and bitsandbytes for their own models alone.
"""

import copy
import math
import warnings
from typing import Any

from benchmarks.case import Check
from benchmarks.shapes import small_llama

ALPHA = 32
BLOCK_SIZE = 64
UNIT_FP32, UNIT_BF16 = 2.0**-24, 2.0**-8
# results that a block rounds to its dtype, one after another: two norms of three steps, the seven linear layers with an
# adapter's product, scaling and sum each, the turned queries and keys, attention's two products and its softmax, the
# gate, two sums
ROUNDINGS_OF_A_BLOCK = 2 * 3 + 7 * 4 + 2 * 3 + 3 + 2 + 2

NEEDS = ("transformers",)

Start = dict[str, tuple[Any, Any]]


def llama(hidden_size: int, device: str, cache: bool = False) -> Any:
    """Return the small Llama of this hidden size with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**small_llama(hidden_size), use_cache=cache))
    return model.to(device, getattr(torch, dtype_of(device)))


def dtype_of(device: str) -> str:
    """Return the dtype that models train and generate in on this device."""
    return "float32" if device == "cpu" else "bfloat16"


def in_float32(model: Any) -> bool:
    """Say whether a model's parameters are float32."""
    import torch

    return next(model.parameters()).dtype == torch.float32


def peer_of(four_bit: bool) -> tuple[str, tuple[str, ...]]:
    """Return the name of the provider that PEFT's model is, and the packages it needs."""
    return ("peft on bitsandbytes", ("peft", "bitsandbytes")) if four_bit else ("peft", ("peft",))


def with_peft(model: Any, rank: int) -> Any:
    """Put PEFT's LoRA on every linear layer but the head."""
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        # a FutureWarning of transformers' own
        warnings.simplefilter("ignore")
        # A and B in the base's dtype
        return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def start_of(base: Any, rank: int) -> Start:
    """Return A and B for every adapted layer: A as PEFT draws it, B not zero, so that a wrong scaling shows at once."""
    import torch

    found = {}
    for name, layer in adapted(base):
        lora_a, lora_b = (
            layer.weight.new_empty(rank, layer.in_features),
            layer.weight.new_empty(layer.out_features, rank),
        )
        torch.nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
        found[name] = (lora_a, torch.nn.init.normal_(lora_b, std=float(lora_a.std())))
    return found


def adapted(model: Any) -> list[tuple[str, Any]]:
    """Return the linear layers that get an adapter, by name: all but the head."""
    from torch import nn

    return [(n, layer) for n, layer in model.named_modules() if type(layer) is nn.Linear and n != "lm_head"]


def ours(base: Any, rank: int, start: Start, four_bit: bool = False) -> Any:
    """Return a copy of the base with this library's adapters, fused."""
    import torch

    import lora_core as lc

    model = copy.deepcopy(base)
    if four_bit:
        lc.quantize_model(model, lc.NF4Config(block_size=BLOCK_SIZE))
    lc.add_adapter(model, lc.LoraConfig(r=rank, lora_alpha=ALPHA, target_modules="all-linear"))
    for name, (lora_a, lora_b) in start.items():
        layer = model.get_submodule(name)
        # in the base's dtype, as PEFT's; by default both libraries keep float32 beside a base in half precision
        layer.lora_a["default"] = torch.nn.Parameter(lora_a.to(layer.weight.dtype, copy=True))
        layer.lora_b["default"] = torch.nn.Parameter(lora_b.to(layer.weight.dtype, copy=True))
    lc.fuse(model)
    return model.train()


def ours_whole(base: Any, rank: int, start: Start, four_bit: bool = False) -> Any:
    """Return the same with norms, gates and attentions fused, too."""
    import lora_core as lc

    model = ours(base, rank, start, four_bit)
    lc.fuse(model, blocks=True)
    return model


def pefts(base: Any, rank: int, start: Start, four_bit: bool = False) -> Any:
    """Return a copy of the base with PEFT's adapters; on bitsandbytes' layers where it is to be in four bits."""
    import torch

    model = copy.deepcopy(base)
    model = with_peft(in_four_bits(model) if four_bit else model, rank)
    with torch.no_grad():
        for name, (lora_a, lora_b) in start.items():
            layer = model.get_base_model().get_submodule(name)
            layer.lora_A["default"].weight.copy_(lora_a)
            layer.lora_B["default"].weight.copy_(lora_b)
    return model.train()


def in_four_bits(model: Any) -> Any:
    """Hold every linear layer but the head as bitsandbytes does, in place; with the bytes this library quantises to."""
    import lora_core as lc

    for name, module in adapted(model):
        parent, _, child = name.rpartition(".")
        q = lc.quantize_nf4(module.weight.data, block_size=BLOCK_SIZE)
        setattr(model.get_submodule(parent), child, linear4bit(q, module.weight.dtype))
    return model


def linear4bit(q: Any, dtype: Any, bias: Any = None) -> Any:
    """Return bitsandbytes' layer with an NF4 weight of this library, computing in dtype."""
    import bitsandbytes as bnb
    from torch import nn

    n, k = q.shape
    layer = bnb.nn.Linear4bit(k, n, bias=bias is not None, compute_dtype=dtype, quant_type="nf4")
    codes, state = bitsandbytes_weight(q)
    fields = {"quant_type": "nf4", "bnb_quantized": True, "module": layer}
    layer.weight = bnb.nn.Params4bit(codes, requires_grad=False, quant_state=state, **fields)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def bitsandbytes_weight(q: Any) -> tuple[Any, Any]:
    """Return packed codes and QuantState of an NF4 weight, as bitsandbytes has them."""
    from bitsandbytes.functional import QuantState

    packed = q.to_bitsandbytes()
    fields = {name.removeprefix("weight."): t for name, t in packed.items() if name != "weight"}
    return packed["weight"], QuantState.from_dict(fields, q.codes.device)


def written(base: Any, rank: int, start: Start, four_bit: bool = False) -> Any:
    """Return a copy of the base in float64 whose adapters are plain PyTorch on dense weights: what is true."""
    import torch
    from torch import nn

    import lora_core as lc

    class Written(nn.Module):
        def __init__(self, weight: Any, lora_a: Any, lora_b: Any) -> None:
            super().__init__()
            self.register_buffer("weight", weight)
            self.lora_a, self.lora_b = nn.Parameter(lora_a), nn.Parameter(lora_b)

        def forward(self, x: Any) -> Any:
            return x @ self.weight.T + ALPHA / rank * (x @ self.lora_a.T) @ self.lora_b.T

    # a 4-bit weight in float32 is exact
    model = copy.deepcopy(base).float().requires_grad_(False)
    for name, layer in adapted(model):
        parent, _, child = name.rpartition(".")
        weight = layer.weight.data
        if four_bit:
            weight = _dequantized(lc.quantize_nf4(weight, block_size=BLOCK_SIZE), weight.dtype)
        setattr(model.get_submodule(parent), child, Written(weight, *(t.clone() for t in start[name])))
    return model.to(torch.float64)


def _dequantized(q: Any, dtype: Any) -> Any:
    from lora_core.reference.nf4 import nf4_dequantize

    return nf4_dequantize(*q.parts, q.shape, dtype, BLOCK_SIZE)


def near(got: list[float], truth: list[float], config: Any, what: str, unit: float = UNIT_FP32) -> Check:
    """Compare numbers a model made with those of the same model in float64.

    The bound is that of a sum as long as all products one token passes through, with the unit roundoff of the dtype
    that they were computed in.
    """
    products = config.num_hidden_layers * (6 * config.hidden_size + config.intermediate_size) + config.hidden_size
    return _near(got, truth, unit, products, what)


def near_bf16(got: list[float], truth: list[float], config: Any, what: str) -> Check:
    """Compare what a model in bfloat16 made: its products are summed in float32, its results rounded to bfloat16."""
    return _near(got, truth, UNIT_BF16, config.num_hidden_layers * ROUNDINGS_OF_A_BLOCK + 2, what)


def _near(got: list[float], truth: list[float], unit: float, terms: int, what: str) -> Check:
    errors = [abs(a - b) for a, b in zip(got, truth, strict=True)]
    bound = 2 * unit * terms**0.5 * max(abs(t) for t in truth)
    rms = (sum(e * e for e in errors) / len(errors)) ** 0.5
    # not a number is not near
    passed = all(e <= bound for e in errors)
    return Check(passed, max(errors), rms, f"{what} differs by {max(errors):.3g}, bound {bound:.3g}")
