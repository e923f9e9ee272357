"""Adapters in models that other libraries move, call or hold in ways of their own."""

import copy

import accelerate
import peft
import pytest
import torch
from models import randomise, tokens, transformers_model
from torch import nn

import lora_core as lc
from lora_core.adapt.walk import adapter_layers

pytestmark = [
    pytest.mark.peer("accelerate", "peft", "transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*"),
]


def adapted(model: nn.Module, targets=("q_proj",), **config) -> nn.Module:
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=list(targets), **config))
    randomise(model)
    return model.eval()


def test_adapters_are_offloaded_with_their_model():
    model = adapted(transformers_model())
    wanted = model(tokens()).logits
    accelerate.cpu_offload(model, execution_device="cpu")
    assert all(p.is_meta for p in model.parameters())
    for _ in range(2):
        assert torch.equal(model(tokens()).logits, wanted)
    assert all(p.is_meta for p in model.parameters())


def test_adapters_added_to_an_offloaded_model_lie_where_it_computes():
    model = transformers_model().eval()
    wanted = adapted(copy.deepcopy(model))
    accelerate.cpu_offload(model, execution_device="cpu")
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["q_proj"]))
    theirs = adapter_layers(wanted)
    for name, layer in adapter_layers(model).items():
        for mine, other in ((layer.lora_a, theirs[name].lora_a), (layer.lora_b, theirs[name].lora_b)):
            assert mine["default"].device.type == "cpu"
            with torch.no_grad():
                mine["default"].copy_(other["default"])
    assert torch.equal(model(tokens()).logits, wanted(tokens()).logits)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(8, 8), torch.randn(2, 8)),
        (nn.Conv1d(8, 8, 1), torch.randn(2, 8, 3)),
        (nn.Embedding(8, 8), torch.tensor([1, 2])),
    ],
    ids=["linear", "conv", "embedding"],
)
def test_matrices_on_another_device_are_refused(layer, x):
    """On the meta device they have no values: a product with them would be whatever was in memory."""
    model = adapted(nn.Sequential(layer), ["0"])
    adapted_layer = model[0]
    adapted_layer.lora_a.to("meta")
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0"]), adapter_name="second")
    lc.set_adapter(model, ["second", "default"])
    with pytest.raises(lc.DeviceError, match="A is on meta, B on cpu, x on cpu"):
        model(x)


@pytest.mark.parametrize("verb", [lc.quantize_model, lambda m: adapted(m), lambda m: adapted(m, ["k_proj"])])
def test_a_model_with_pefts_adapters_is_refused_and_stays_as_it_was(verb):
    theirs = peft.get_peft_model(transformers_model(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    before = {name: (type(module), module) for name, module in theirs.named_modules()}
    with pytest.raises(lc.AdapterError, match="q_proj has PEFT's adapters; call lora_core.fuse"):
        verb(theirs)
    assert {name: (type(module), module) for name, module in theirs.named_modules()} == before


@pytest.mark.parametrize("targets", [["0"], "all-linear"])
def test_a_single_layer_is_no_model(targets):
    layer = nn.Linear(64, 64)
    with pytest.raises(lc.ConfigError, match=r"single Linear.* put it into a module first, e.g. nn.Sequential"):
        lc.quantize_model(layer)
    with pytest.raises(lc.TargetNotFoundError, match=r"has no modules inside; put a single layer into one first"):
        lc.add_adapter(layer, lc.LoraConfig(target_modules=targets))
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]


def test_a_second_adapter_that_trains_biases_is_refused(tmp_path):
    """There is one set of biases: it would change what the first one computes, and its checkpoint."""
    model = adapted(nn.Sequential(nn.Linear(8, 8)), ["0"], bias="lora_only")
    lc.save_adapter(model, tmp_path)
    before = model(torch.ones(1, 8))
    for add in (
        lambda: lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0"], bias="all"), adapter_name="second"),
        lambda: lc.load_adapter(model, tmp_path, adapter_name="second"),
    ):
        with pytest.raises(lc.AdapterError, match="adapter 'default' trains the model's biases already"):
            add()
    assert torch.equal(model(torch.ones(1, 8)), before)
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0"]), adapter_name="second")
    lc.delete_adapter(model, "default")
    lc.load_adapter(model, tmp_path, adapter_name="again")


class Router(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        # a tuple that does not show where it is returned, or the layer were refused before
        both = y, y.softmax(-1)
        return both


def test_a_layer_that_returns_no_tensor_is_refused_by_its_class():
    model = adapted(nn.Sequential(Router(8, 4)), ["0"])
    with pytest.raises(lc.ConfigError, match="a Router returns a tuple.* leave it out with exclude_modules"):
        model(torch.randn(2, 8))


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(64, 8), torch.randn(2, 64)),
        (nn.Conv2d(3, 8, 1), torch.randn(2, 3, 4, 4)),
        (nn.Embedding(8, 8), torch.tensor([1, 2])),
    ],
    ids=["linear", "conv", "embedding"],
)
def test_an_adapted_layer_takes_its_input_by_name_as_pytorchs_does(layer, x):
    layer(input=x)
    (mine,) = adapted(nn.Sequential(layer), ["0"])
    assert torch.equal(mine(input=x), mine(x))
    if isinstance(layer, nn.Linear):
        (packed,) = lc.quantize_model(nn.Sequential(layer), skip_modules=[])
        assert torch.equal(packed(input=x), packed(x))


def test_a_fused_layer_prepared_for_swapped_adapters_runs_as_pefts():
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    model = peft.get_peft_model(transformers_model(), peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"])).eval()
    randomise(model)
    other = copy.deepcopy(model)
    lc.fuse(model)
    for one in (model, other):
        prepare_model_for_compiled_hotswap(one, target_rank=8)
    assert torch.equal(model(tokens()).logits, other(tokens()).logits)


def test_dilated_convolutions_are_said_to_differ_in_peft(tmp_path):
    model = adapted(nn.Sequential(nn.Conv2d(4, 8, 3, padding="same", dilation=2)), ["0"])
    with pytest.warns(UserWarning, match=r"0 has a dilation of \(2, 2\): PEFT"):
        lc.save_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match=r"0 has a dilation of \(2, 2\): PEFT"):
        lc.load_adapter(nn.Sequential(nn.Conv2d(4, 8, 3, padding="same", dilation=2)), tmp_path)


@pytest.mark.peer("bitsandbytes")
def test_parameters_that_bitsandbytes_has_packed_are_counted_as_peft_counts_them(capsys):
    import bitsandbytes as bnb

    packed = bnb.nn.Linear4bit(64, 64, quant_type="nf4")
    packed.weight = packed.weight._quantize("cpu")
    model = peft.get_peft_model(nn.Sequential(nn.Linear(64, 64), packed), peft.LoraConfig(r=2, target_modules=["0"]))
    model.print_trainable_parameters()
    lc.print_trainable_parameters(model)
    theirs, ours = capsys.readouterr().out.splitlines()
    assert theirs == ours
