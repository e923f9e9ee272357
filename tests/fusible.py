"""Small models with layers that can be fused, whoever made them, and the check of a layer against the formula."""

import bitsandbytes as bnb
import peft
import pytest
import torch
from lora_bounds import check_backward, check_forward
from models import randomise
from torch import nn

import lora_core as lc
from lora_core.ops.lora_linear import op
from lora_core.quant import QuantizedWeight

# of the files that test such models
MARKS = [
    pytest.mark.peer("bitsandbytes", "peft", "transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning"),
]

WIDTH = 64
TARGETS = ["q_proj", "up_proj"]
NOTHING = "neither adapted nor in 4 bits: there is nothing to fuse"


class Projections(nn.Module):
    """Layers as attention and an MLP have them; 40 columns, so that blocks of 64 straddle rows."""

    def __init__(self, bias=True, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.q_proj = nn.Linear(WIDTH, 40, bias=bias, dtype=dtype)
        self.up_proj = nn.Linear(40, 72, bias=bias, dtype=dtype)
        self.out = nn.Linear(72, 7, dtype=dtype)

    def forward(self, x):
        return self.out(torch.tanh(self.up_proj(torch.tanh(self.q_proj(x)))))


def linear4bit(dense, **fields):
    """A dense layer as bitsandbytes holds it."""
    fields = {"quant_type": "nf4", "compute_dtype": dense.weight.dtype, **fields}
    layer = bnb.nn.Linear4bit(dense.in_features, dense.out_features, bias=dense.bias is not None, **fields)
    layer.load_state_dict(dense.state_dict())
    layer.bias = None if dense.bias is None else nn.Parameter(dense.bias.detach().clone(), requires_grad=False)
    layer = layer.to("cpu")
    if layer.weight.quant_state is None:
        layer.weight = layer.weight._quantize(torch.device("cpu"))
    return layer


def in_four_bits(model, targets=TARGETS, **fields):
    for name in targets:
        setattr(model, name, linear4bit(getattr(model, name), **fields))
    return model


def with_peft(model, **config):
    config = {"target_modules": TARGETS, "r": 4, "lora_alpha": 6, **config}
    model = peft.get_peft_model(model, peft.LoraConfig(**config))
    randomise(model)
    return model


def own(quantised=False, dtype=torch.float32, **config):
    model = Projections(dtype=dtype)
    if quantised:
        lc.quantize_model(model, skip_modules=["out"])
    lc.add_adapter(model, lc.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, **config))
    randomise(model)
    return model


HALF = torch.bfloat16
MAKERS = {
    "own": own,
    "own nf4": lambda: own(quantised=True),
    "own bf16": lambda: own(dtype=HALF),
    "peft": lambda: with_peft(Projections()),
    "peft bf16": lambda: with_peft(Projections(dtype=HALF)),
    "peft rslora without bias": lambda: with_peft(Projections(bias=False), use_rslora=True),
    "peft 4-bit": lambda: with_peft(in_four_bits(Projections())),
    "peft 4-bit bf16": lambda: with_peft(in_four_bits(Projections(dtype=HALF))),
    "peft 4-bit plain scales": lambda: with_peft(in_four_bits(Projections(), compress_statistics=False)),
    "peft 4-bit stored as bf16": lambda: with_peft(in_four_bits(Projections(), quant_storage=HALF)),
    "bitsandbytes": lambda: in_four_bits(Projections()),
    "bitsandbytes bf16": lambda: in_four_bits(Projections(bias=False, dtype=HALF)),
}


def pieces(layer, dtype):
    """W dense, b, A, B and s of a layer, whoever made it."""
    base = getattr(layer, "base_layer", layer)
    if isinstance(base, bnb.nn.Linear4bit):
        weight = QuantizedWeight.from_bitsandbytes(base.state_dict(), prefix="weight").dequantize(dtype)
    else:
        weight = base.weight.dequantize(dtype) if isinstance(base.weight, QuantizedWeight) else base.weight
    if isinstance(layer, lc.layers.adapter.AdapterLayer):
        adapter = layer.lora_a["default"], layer.lora_b["default"], layer.adapters["default"].scaling
    elif hasattr(layer, "lora_A"):
        adapter = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    else:
        adapter = torch.zeros(0, weight.shape[1]), torch.zeros(len(weight), 0), 0.0
    return weight.detach(), base.bias, *adapter


def check_layer(layer, dtype):
    """Compare output and gradients with the formula in float64."""
    weight, bias, lora_a, lora_b, scaling = pieces(layer, dtype)
    x = torch.randn(6, weight.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    d_y = torch.randn(6, len(weight), generator=torch.Generator().manual_seed(2)).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    check_forward(y.detach(), x, weight, bias, lora_a, lora_b, scaling)
    leaves = [x, *(t for t in (lora_a, lora_b) if t.requires_grad)]
    d_x, *rest = torch.autograd.grad(y, leaves, d_y)
    hidden = op(x.detach(), weight, None, lora_a.detach(), lora_b.detach(), scaling, 0.0, None)[1]
    grads = (d_x, None, None, *(rest or (None, None)))
    check_backward(grads, d_y, x, weight, lora_a, lora_b, hidden, scaling)
