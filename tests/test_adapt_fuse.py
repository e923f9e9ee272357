"""fuse and unfuse: own, PEFT's and bitsandbytes' layers, the same results, the same objects."""

import copy

import bitsandbytes as bnb
import peft
import pytest
import torch
from fusible import (
    HALF,
    MAKERS,
    MARKS,
    NOTHING,
    TARGETS,
    WIDTH,
    Projections,
    check_layer,
    in_four_bits,
    linear4bit,
    pieces,
    with_peft,
)
from lora_bounds import check_forward
from models import randomise
from torch import nn

import lora_core as lc
from lora_core.layers.fused import Fused

pytestmark = MARKS


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_fused_layers_compute_the_formula_forward_and_backward(make, train):
    model = make().train(train)
    dtype = model.get_submodule(lc.fuse(model).swapped[0].rpartition(".")[0]).out.weight.dtype
    fused = [m for m in model.modules() if isinstance(m, Fused)]
    assert len(fused) == 2
    for layer in fused:
        check_layer(layer, dtype)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_fuse_keeps_the_objects_and_unfuse_gives_their_classes_back(make):
    model = make()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    classes = {name: type(module) for name, module in modules.items()}
    state = {name: t.data_ptr() for name, t in (*parameters.items(), *model.named_buffers())}
    keys = list(model.state_dict())
    report = lc.fuse(model)
    assert [name.rpartition(".")[2] for name in report.swapped] == TARGETS
    assert [name.rpartition(".")[2] for name in report.skipped] == ["out"]
    assert list(report.skipped.values()) == [NOTHING]
    assert dict(model.named_modules()) == modules
    now = {name: t.data_ptr() for name, t in (*model.named_parameters(), *model.named_buffers())}
    assert now == state and list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters.values(), strict=True))
    assert all(isinstance(modules[n], Fused) and isinstance(modules[n], classes[n]) for n in report.swapped)
    assert set(lc.fuse(model).skipped.values()) == {"it is fused already", NOTHING}
    assert lc.unfuse(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == classes


def test_fused_peft_layers_add_several_adapters():
    model = with_peft(Projections())
    model.add_adapter("other", peft.LoraConfig(target_modules=TARGETS, r=3))
    randomise(model)
    model.base_model.set_adapter(["default", "other"])
    lc.fuse(model)
    layer, x = model.base_model.model.q_proj, torch.randn(5, WIDTH)
    pairs = [(layer.lora_A[n].weight, layer.lora_B[n].weight, layer.scaling[n]) for n in ("default", "other")]
    lora_a = torch.cat([a for a, _, _ in pairs])
    lora_b = torch.cat([s * b for _, b, s in pairs], 1)
    check_forward(layer(x).detach(), x, layer.base_layer.weight, layer.base_layer.bias, lora_a, lora_b, 1.0)


@pytest.mark.parametrize("name", ["peft", "peft 4-bit"])
def test_fused_dropout_drops_in_training_alone_and_repeats_with_the_seed(name):
    four_bit = name == "peft 4-bit"
    model = with_peft(in_four_bits(Projections()) if four_bit else Projections(), lora_dropout=0.5)
    lc.fuse(model)
    layer, x = model.base_model.model.q_proj, torch.randn(5, WIDTH)
    model.eval()
    quiet = layer(x)
    check_layer(layer, torch.float32)
    model.train()
    torch.manual_seed(3)
    first, second = layer(x), layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first) and not torch.equal(first, second) and not torch.equal(first, quiet)
    # inverted dropout keeps the mean: over many masks it comes within five standard errors
    many = torch.stack([layer(x) for _ in range(400)]).detach().double()
    error = (many.mean(0) - quiet.detach().double()).abs()
    assert bool((error <= 5 * many.std(0) / 20).all())


@pytest.mark.parametrize("name", ["own", "peft", "peft 4-bit", "bitsandbytes"])
def test_fuse_takes_a_single_layer(name):
    layer = next(m for n, m in MAKERS[name]().named_modules() if n.endswith("q_proj"))
    report = lc.fuse(layer)
    assert report.swapped == [""] and report.skipped == {}
    check_layer(layer, torch.float32)


def test_fuse_reads_a_transposed_base_layer():
    """GPT-2's Conv1D stores W^T."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=61, n_positions=32)).eval()
    model = with_peft(model, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    report = lc.fuse(model)
    assert len(report.swapped) == 6
    layer, x = model.get_submodule(report.swapped[0]), torch.randn(5, 32)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    base = layer.base_layer
    check_forward(layer(x).detach(), x, base.weight.T, base.bias, a, b, layer.scaling["default"])


def test_fused_4bit_layer_computes_in_bitsandbytes_dtypes():
    """float32 in, bfloat16 inside, float32 out; the type is taken from x where none was set."""
    layer = linear4bit(nn.Linear(WIDTH, 8), compute_dtype=HALF)
    free = linear4bit(nn.Linear(WIDTH, 8), compute_dtype=None)
    x = torch.randn(3, WIDTH)
    for made, inside in ((layer, HALF), (free, torch.float32)):
        want = made(x).detach()
        model = nn.Sequential(made)
        lc.fuse(model)
        y = model(x)
        assert y.dtype == want.dtype == torch.float32 and made.compute_dtype == inside
        check_forward(y.to(inside), x.to(inside), *pieces(made, inside)[:2], *pieces(made, inside)[2:])


@pytest.mark.parametrize("with_adapter", [False, True], ids=["alone", "adapted"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_fused_4bit_layer_is_traced(with_adapter):
    model = nn.Sequential(linear4bit(nn.Linear(64, 32)))
    if with_adapter:
        model = with_peft(model, target_modules=["0"])
    lc.fuse(model)
    x = torch.randn(5, 64)
    assert torch.equal(torch.jit.trace(model.eval(), x)(x), model(x))


def test_fused_4bit_layer_keeps_the_dtype_that_its_first_input_set():
    layer, x = linear4bit(nn.Linear(WIDTH, 8), compute_dtype=None), torch.randn(3, WIDTH)
    fused = copy.deepcopy(layer)
    lc.fuse(fused)
    for made in (layer, fused):
        made(x)
        made(x.to(HALF))
    assert fused.compute_dtype == layer.compute_dtype


def test_fused_4bit_layer_finds_the_state_that_its_parameter_has_lost():
    """As FSDP makes a layer's parameter anew: the layer has the state too."""
    layer, x = linear4bit(nn.Linear(WIDTH, 8)), torch.randn(3, WIDTH)
    layer.quant_state = layer.weight.quant_state
    lc.fuse(layer)
    wanted = layer(x)
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    assert getattr(layer.weight, "quant_state", None) is None
    y = layer.alone(x)
    assert y is not None and torch.equal(y, wanted)


def test_scales_that_change_between_siblings_are_seen_where_a_parameter_has_lost_its_state():
    """As FSDP makes a layer's parameter anew: the layer has the state too, and the scales in it."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)

        def forward(self, x):
            return self.a(x) + self.b(x)

    model = in_four_bits(Two(), ["a", "b"], compress_statistics=False)
    whole = with_peft(model, target_modules=["a", "b"])
    assert lc.fuse(whole).shared
    for base in (model.a.base_layer, model.b.base_layer):
        base.quant_state = base.weight.quant_state
        base.weight = nn.Parameter(base.weight.data, requires_grad=False)
    x = torch.randn(80, WIDTH)
    with torch.no_grad():
        model.a(x)
        model.b.base_layer.quant_state.absmax.mul_(2)
        y = model.b(x)
    base = model.b.base_layer
    dense = bnb.functional.dequantize_4bit(base.weight.data, base.quant_state)
    adapter = model.b.lora_A["default"].weight, model.b.lora_B["default"].weight, model.b.scaling["default"]
    check_forward(y, x, dense, base.bias, *adapter)


def test_a_model_with_pefts_adapters_is_said_to_have_pefts(tmp_path):
    model = with_peft(Projections())
    lc.fuse(model)
    with pytest.raises(lc.AdapterError, match="no adapter named 'default'.*it has PEFT's, for which PEFT has verbs"):
        lc.save_adapter(model, tmp_path)
