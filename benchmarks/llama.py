"""Small Llamas with adapters of the same start in this library and in PEFT, on a dense and on an NF4 base."""

import copy
import warnings
from typing import Any

from benchmarks.case import Check
from benchmarks.shapes import small_llama

ALPHA = 32
BLOCK_SIZE = 64
UNIT_FP32 = 2.0**-24

Start = dict[str, tuple[Any, Any]]


def llama(hidden_size: int, device: str, cache: bool = False) -> Any:
    """Return the small Llama of this hidden size with random weights in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**small_llama(hidden_size), use_cache=cache)).to(device)


def with_peft(model: Any, rank: int) -> Any:
    """Put PEFT's LoRA on every linear layer but the head."""
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        # a FutureWarning of transformers' own
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config)


def start_of(base: Any, rank: int) -> Start:
    """Return A and B for every adapted layer: A as PEFT draws it, B not zero, so that a wrong scaling shows at once."""
    import torch

    found = {}
    for name, module in with_peft(copy.deepcopy(base), rank).get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            lora_a = module.lora_A["default"].weight.detach().clone()
            found[name] = (lora_a, torch.randn_like(module.lora_B["default"].weight) * lora_a.std())
    return found


def ours(base: Any, rank: int, start: Start, four_bit: bool = False) -> Any:
    """Return a copy of the base with this library's adapters, fused."""
    import torch

    import lora_core as lc

    model = copy.deepcopy(base)
    if four_bit:
        lc.quantize_model(model, lc.NF4Config(block_size=BLOCK_SIZE))
    lc.add_adapter(model, lc.LoraConfig(r=rank, lora_alpha=ALPHA, target_modules="all-linear"))
    with torch.no_grad():
        for name, (lora_a, lora_b) in start.items():
            layer = model.get_submodule(name)
            layer.lora_a["default"].copy_(lora_a)
            layer.lora_b["default"].copy_(lora_b)
    lc.fuse(model)
    return model.train()


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
    from torch import nn

    import lora_core as lc

    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
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


def spelt_out(model: Any) -> Any:
    """Return a copy of PEFT's model whose 4-bit weights are dense, so that it can run in float64."""
    from torch import nn

    from lora_core.layers.bitsandbytes_weight import packed_weight
    from lora_core.layers.fused import is_four_bit

    model = copy.deepcopy(model)
    for module in list(model.modules()):
        base = getattr(module, "base_layer", None)
        if base is not None and is_four_bit(base):
            dense = nn.Linear(base.in_features, base.out_features, bias=False)
            dense.weight.data = packed_weight(base).dense(base.compute_dtype)
            module.base_layer = dense.requires_grad_(False)
    return model


def near(got: list[float], truth: list[float], config: Any, what: str, unit: float = UNIT_FP32) -> Check:
    """Compare numbers a model made with those of the same model in float64.

    The bound is that of a sum as long as all products one token passes through, with the unit roundoff of the dtype
    that they were computed in.
    """
    products = config.num_hidden_layers * (6 * config.hidden_size + config.intermediate_size) + config.hidden_size
    errors = [abs(a - b) for a, b in zip(got, truth, strict=True)]
    bound = 2 * unit * products**0.5 * max(abs(t) for t in truth)
    rms = (sum(e * e for e in errors) / len(errors)) ** 0.5
    return Check(max(errors) <= bound, max(errors), rms, f"{what} differs by {max(errors):.3g}, bound {bound:.3g}")
