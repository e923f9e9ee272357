"""Holding a model's linear layers in NF4."""

import copy
import warnings
import weakref

import pytest
import torch
from models import TinyDecoder, randomise, tokens
from torch import nn

import lora_core as lc
from lora_core.adapt.walk import adapter_layers
from lora_core.layers.nf4_linear import LoraNF4Linear, NF4Linear


def kinds(model):
    return {n: type(m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, NF4Linear))}


def test_quantising_replaces_all_but_the_head():
    model = TinyDecoder()
    assert lc.quantize_model(model) is model
    assert [n for n, k in kinds(model).items() if k is nn.Linear] == ["lm_head"]
    assert not any(p.requires_grad for n, p in model.named_parameters() if "proj" in n)


def test_a_dense_weight_is_let_go_before_the_next_is_quantised(monkeypatch):
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    dense = [weakref.ref(layer.weight) for layer in model]
    held = []
    from_dense = NF4Linear.from_dense.__func__

    def watched(cls, layer, **config):
        held.append(sum(weight() is not None for weight in dense))
        return from_dense(cls, layer, **config)

    monkeypatch.setattr(NF4Linear, "from_dense", classmethod(watched))
    lc.quantize_model(model, skip_modules=[])
    assert held == [4, 3, 2, 1]


def test_stacked_weights_that_stay_dense_are_told_with_their_share():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(4, 8, 8))

    model = nn.ModuleDict({"experts": Experts(), "fc": nn.Linear(8, 8, bias=False)})
    told = r"stacked weights in full precision.*: experts\.gate_up_proj: 256 of 320 parameters"
    with pytest.warns(UserWarning, match=told):
        lc.quantize_model(copy.deepcopy(model), skip_modules=[])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lc.quantize_model(model, skip_modules=["experts"])


@pytest.mark.peer("accelerate")
def test_layers_that_accelerate_has_hooked_are_told_shortly_and_with_the_way():
    import accelerate

    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(9)), nn.Linear(64, 64))
    for layer in model[:9]:
        accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))
    with pytest.warns(UserWarning, match="leaves 0, 1, 2 and 6 more in full precision.*before it is dispatched"):
        lc.quantize_model(model, skip_modules=[])


def test_skip_modules_are_left_alone_and_replace_the_default():
    model = lc.quantize_model(TinyDecoder(), skip_modules=["q_proj"])
    left = [n for n, k in kinds(model).items() if k is nn.Linear]
    assert left == [f"layers.{i}.attn.q_proj" for i in range(3)]


@pytest.mark.parametrize(("skip", "left"), [("layers", range(3)), ("layers.1", [1]), ("attn", range(3))])
def test_skip_modules_mean_all_inside(skip, left):
    model = lc.quantize_model(TinyDecoder(), skip_modules=[skip])
    inside = "attn." if skip == "attn" else ""
    whole = [n for n in kinds(TinyDecoder()) if any(n.startswith(f"layers.{i}.{inside}") for i in left)]
    assert [n for n, kind in kinds(model).items() if kind is nn.Linear] == whole


@pytest.mark.parametrize("skip", [None, [], ["q_proj"]])
def test_tied_weights_are_never_quantised(skip):
    model = lc.quantize_model(TinyDecoder(tied=True), skip_modules=skip)
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.embed_tokens.weight


def test_quantised_model_equals_the_dense_model_of_the_dequantised_weights():
    model, dense = TinyDecoder(), TinyDecoder()
    dense.load_state_dict(model.state_dict())
    lc.quantize_model(model)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, NF4Linear):
                dense.get_submodule(name).weight.copy_(module.weight.dequantize())
    assert torch.equal(model(tokens()), dense(tokens()))


def test_adapters_on_a_quantised_model_train():
    model = lc.quantize_model(TinyDecoder().bfloat16())
    lc.add_adapter(model, lc.LoraConfig(r=4, target_modules="all-linear"))
    randomise(model)
    assert {type(m) for m in adapter_layers(model).values()} == {LoraNF4Linear}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(tokens()).float().logsumexp(-1).mean().backward()
    optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {n for n, p in model.named_parameters() if "lora_" in n}


def test_quantised_model_round_trips_through_its_state_dict():
    model, other = lc.quantize_model(TinyDecoder()), lc.quantize_model(TinyDecoder())
    assert not torch.equal(model(tokens()), other(tokens()))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens()), other(tokens()))


def test_casting_a_quantised_model_leaves_its_scales_alone():
    model = lc.quantize_model(TinyDecoder())
    want = model.layers[0].up_proj.weight.dequantize(torch.float32)
    model.half()
    assert torch.equal(model.layers[0].up_proj.weight.dequantize(torch.float32), want)
    assert model(tokens()).dtype == torch.float16


def test_transposed_layers_are_quantised_to_the_same_function():
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(6, 64))
    dense = model[0].weight.detach().clone()
    lc.quantize_model(model)
    assert torch.equal(model[0].weight.dequantize(), lc.quantize_nf4(dense.T).dequantize())
    assert model(torch.randn(2, 64)).shape == (2, 6)


def test_quantising_refuses_what_it_cannot_do():
    with pytest.raises(lc.TargetNotFoundError, match="no linear layer"):
        lc.quantize_model(nn.Sequential(nn.Conv1d(2, 2, 1)))
    model = TinyDecoder()
    with torch.no_grad():
        model.layers[1].up_proj.weight[3, 5] = float("nan")
    with pytest.raises(
        lc.NonFiniteError, match=r"layers.1.up_proj.weight: .* at index \(3, 5\).*the model is unchanged"
    ):
        lc.quantize_model(model)
    assert not any(isinstance(module, lc.quant.QuantizedWeight) for module in model.modules())
    with pytest.raises(lc.DtypeError, match="q_proj.weight: cannot quantise torch.float64"):
        lc.quantize_model(TinyDecoder().double())
    with pytest.raises(lc.ConfigError, match="want an NF4Config"):
        lc.quantize_model(TinyDecoder(), {"block_size": 64})
    adapted = lc.add_adapter(TinyDecoder(), lc.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(lc.AdapterError, match="before adding"):
        lc.quantize_model(adapted)


def test_quantising_warns_of_skip_modules_that_name_nothing():
    with pytest.warns(UserWarning, match="no module is called 'lm_hed'") as caught:
        lc.quantize_model(TinyDecoder(), skip_modules=["lm_head", "lm_hed"])
    assert caught[0].filename == __file__


@pytest.mark.parametrize("skip", ["lm_head", 5, [1], [None]])
def test_skip_modules_that_are_no_list_of_names_are_refused(skip):
    with pytest.raises(lc.ConfigError, match="skip_modules is .*; want a list of names"):
        lc.quantize_model(TinyDecoder(), skip_modules=skip)


def test_quantised_model_goes_into_a_safetensors_file(tmp_path):
    from safetensors.torch import load_file, save_file

    model = lc.quantize_model(TinyDecoder())
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = lc.quantize_model(TinyDecoder())
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x = tokens()
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8], ids=str)
def test_dtypes_that_are_none_are_refused(dtype):
    with pytest.raises(lc.ConfigError, match="compute_dtype is"):
        lc.NF4Config(compute_dtype=dtype)
    with pytest.raises(lc.DtypeError, match="cannot dequantise to"):
        lc.quantize_nf4(torch.randn(64)).dequantize(dtype)
    with pytest.raises(lc.DtypeError, match="cannot quantise a list"):
        lc.quantize_nf4([[1.0]])


def test_skip_modules_mean_plain_names_inside_a_compiled_part():
    model = TinyDecoder()
    model.layers[0] = torch.compile(model.layers[0])
    lc.quantize_model(model, skip_modules=["layers.0.attn.q_proj"])
    assert [n for n, m in model.named_modules() if isinstance(m, nn.Linear)] == ["layers.0._orig_mod.attn.q_proj"]


@pytest.mark.parametrize("fused", [False, True])
def test_a_compute_dtype_stays_where_the_model_is_converted(fused):
    """model.double() converts the matrices alone; they take part in float32 then."""
    config = lc.NF4Config(compute_dtype=torch.bfloat16)
    model = lc.quantize_model(nn.Sequential(nn.Linear(64, 8)), config, skip_modules=[])
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    if fused:
        lc.fuse(model)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    want = model(x.float())
    y = model.double()(x.double())
    assert y.dtype == torch.float64 and torch.equal(y, want.double())


@pytest.mark.parametrize("double_quant", [1, "no", None])
def test_configuration_whose_double_quant_is_no_boolean_is_refused(double_quant):
    with pytest.raises(lc.ConfigError, match="NF4Config: double_quant is .*; want True or False"):
        lc.NF4Config(double_quant=double_quant)


def test_quantising_again_in_another_format_changes_nothing_and_says_so():
    model = lc.quantize_model(nn.Sequential(nn.Linear(64, 64)), skip_modules=[])
    with pytest.warns(UserWarning, match="leaves 0 in the 4-bit format they are in"):
        lc.quantize_model(model, lc.NF4Config(block_size=128), skip_modules=[])
    assert model[0].weight.block_size == 64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lc.quantize_model(model, skip_modules=[])


def test_a_layer_that_holds_another_stays_and_the_other_is_quantised():
    model = nn.Sequential(nn.Linear(64, 64))
    model[0].extra = nn.Linear(64, 64)
    with pytest.warns(UserWarning, match="leaves 0 in full precision.*modules inside"):
        lc.quantize_model(model, skip_modules=[])
    assert type(model[0]) is nn.Linear and isinstance(model[0].extra, NF4Linear)


@pytest.mark.parametrize(
    "layer", [nn.ConvTranspose1d(4, 6, 3), nn.Bilinear(4, 6, 3)], ids=lambda layer: type(layer).__name__
)
def test_weights_of_pytorchs_own_layers_are_no_stacks(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lc.quantize_model(nn.Sequential(nn.Linear(64, 64), layer), skip_modules=[])


def test_a_stacked_weight_of_the_model_itself_is_told():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.Parameter(torch.randn(4, 8, 8))
            self.fc = nn.Linear(8, 8)

    with pytest.warns(UserWarning, match="stacked weights in full precision.*: experts: 256 of 328"):
        lc.quantize_model(Root(), skip_modules=[])
