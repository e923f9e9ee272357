"""Forward, loss and backward of a small Llama with PEFT's adapters, fused, beside the same model as PEFT runs it.

A shape's K is the hidden size, M the tokens of a step, R the rank. The base is float32, or NF4 held by bitsandbytes.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks.case import Case, Claim, Provider
from benchmarks.cases import training_step
from benchmarks.shapes import small_llama

SHAPES = ({"M": 1024, "K": 256, "R": 16},)

BLOCK_SIZE = 64


def cases(shape: dict[str, int], device: str) -> Iterator[Case]:
    """Yield the comparison on a dense base and on a 4-bit one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import lora_core as lc

    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**small_llama(shape["K"]), use_cache=False)).to(device)
    tokens = torch.randint(dense.config.vocab_size, (training_step.SEQUENCES, shape["M"] // training_step.SEQUENCES))
    for block_size in (None, BLOCK_SIZE):
        base = dense if block_size is None else _in_four_bits(copy.deepcopy(dense))
        plain = _adapted(base, shape["R"])
        fused = copy.deepcopy(plain)
        lc.fuse(fused)
        models = {"lora_core": fused, "peft": plain}
        truth = training_step.losses(_spelt_out(plain).double(), tokens.to(device))
        yield Case(
            op="fuse",
            mode="fwdbwd",
            shape=shape,
            dtype="float32",
            block_size=block_size,
            providers=[Provider(name, _step(model, tokens.to(device))) for name, model in models.items()],
            check=partial(_check, models, tokens.to(device), truth),
            claims=(Claim(against="peft", no_slower=True),),
            note=f"Llama of {dense.config.num_hidden_layers} layers, all-linear, adapters of PEFT",
        )


def _adapted(base: Any, rank: int) -> Any:
    import torch

    model = training_step.with_peft(copy.deepcopy(base), rank)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model.train()


def _in_four_bits(model: Any) -> Any:
    """Hold every linear layer but the head as bitsandbytes does."""
    import bitsandbytes as bnb
    from torch import nn

    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            fields = {"quant_type": "nf4", "compute_dtype": module.weight.dtype}
            layer = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, **fields)
            layer.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.to(module.weight.device))
            if layer.weight.quant_state is None:
                layer.weight = layer.weight._quantize(module.weight.device)
    return model


def _spelt_out(model: Any) -> Any:
    """Return a copy whose 4-bit weights are dense, so that it can run in float64."""
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


def _step(model: Any, tokens: Any) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()

    return step


def _check(models: dict[str, Any], tokens: Any, truth: list[float], name: str) -> Any:
    """Compare the losses of a few steps of a copy with those in float64."""
    return training_step.check(copy.deepcopy(models[name]), tokens, truth)
