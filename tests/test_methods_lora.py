"""LoRA's configuration, scaling and starts."""

import math
import warnings

import pytest
import torch
from models import TinyDecoder, tokens
from tolerance import assert_within_rounding
from torch import nn

import lora_core as lc
from lora_core.adapt.walk import adapter_layers


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_start_leaves_the_model_exactly_as_it_was(init):
    model = TinyDecoder()
    before = model(tokens())
    lc.add_adapter(model, lc.LoraConfig(init_lora_weights=init, target_modules=r".*(proj|embed_tokens|lm_head)"))
    assert torch.equal(model(tokens()), before)


def test_start_false_changes_the_model():
    model = TinyDecoder()
    before = model(tokens())
    lc.add_adapter(model, lc.LoraConfig(init_lora_weights=False, target_modules="all-linear"))
    assert not torch.equal(model(tokens()), before)


def started(init, rank=8, size=512):
    model = nn.Sequential(nn.Linear(size, size))
    lc.add_adapter(model, lc.LoraConfig(r=rank, target_modules=["0"], init_lora_weights=init))
    return model[0]


@pytest.mark.parametrize(("init", "std"), [(True, 1 / math.sqrt(3 * 512)), ("gaussian", 1 / 8)])
def test_start_has_the_documented_spread(init, std):
    a = started(init).lora_a["default"]
    # the standard deviation of n samples is within 4 / sqrt(2 n) of its value, but for one case in 10^4
    assert abs(a.std().item() / std - 1) < 4 / math.sqrt(2 * a.numel())
    if init is True:
        assert a.abs().max() <= 1 / math.sqrt(512)


def test_embedding_starts_with_a_at_zero_and_b_normal():
    model = nn.Sequential(nn.Embedding(100, 64))
    lc.add_adapter(model, lc.LoraConfig(target_modules=["0"]))
    assert not model[0].lora_a["default"].any()
    assert model[0].lora_b["default"].std() > 0.5


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 16 / 9), (True, 16 / 3)])
def test_scaling_follows_the_method(rslora, scaling):
    config = lc.LoraConfig(r=9, lora_alpha=16, use_rslora=rslora)
    assert config.scaling_of("any") == scaling


def test_patterns_set_rank_and_alpha_of_single_layers():
    config = lc.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        rank_pattern={"q_proj": 2, r"layers\.1\..*up_proj": 6},
        alpha_pattern={"q_proj": 3},
    )
    model = lc.add_adapter(TinyDecoder(), config)
    ranks = {n: layer.adapters["default"].rank for n, layer in adapter_layers(model).items()}
    assert ranks["layers.0.attn.q_proj"] == 2 and ranks["layers.1.up_proj"] == 6 and ranks["layers.0.up_proj"] == 4
    layers = adapter_layers(model)
    assert layers["layers.0.attn.q_proj"].adapters["default"].scaling == 1.5
    assert layers["layers.1.up_proj"].adapters["default"].scaling == 8 / 6
    assert layers["layers.1.up_proj"].lora_a["default"].shape[0] == 6


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_8", "olora"])
@pytest.mark.parametrize("kind", ["linear", "wide", "conv1d"])
def test_start_from_the_weight_splits_it(init, kind):
    """W becomes W - s B A: the sum is the old weight, up to one rounding of each part."""
    from transformers.pytorch_utils import Conv1D

    base = {"linear": nn.Linear(12, 20), "wide": nn.Linear(30, 8), "conv1d": Conv1D(9, 13)}[kind]
    with torch.no_grad():
        base.weight.normal_()
    old = base.weight.detach().clone()
    model = nn.Sequential(base)
    lc.add_adapter(model, lc.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=init))
    layer = model[0]
    scaling = layer.adapters["default"].scaling
    a, b = layer.lora_a["default"].detach(), layer.lora_b["default"].detach()
    transposed = kind == "conv1d"

    def whole(residual, a, b):
        product = scaling * (b @ a)
        return residual + (product.T if transposed else product)

    assert not torch.equal(layer.weight, old)
    assert_within_rounding(old, whole, layer.weight.detach(), a, b, depth=4 + 2)


@pytest.mark.parametrize("shape", [(12, 20), (16, 16)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_pissa_takes_the_largest_singular_values(shape, transposed):
    from transformers.pytorch_utils import Conv1D

    base = Conv1D(*shape[::-1]) if transposed else nn.Linear(*shape)
    nn.init.kaiming_uniform_(base.weight)
    values = torch.linalg.svdvals(base.weight.detach().double())
    model = nn.Sequential(base)
    lc.add_adapter(model, lc.LoraConfig(r=5, target_modules=["0"], init_lora_weights="pissa"))
    kept = torch.linalg.svdvals(model[0].delta("default").double())[:5]
    rest = torch.linalg.svdvals(model[0].weight.detach().double())
    # a singular value moves by at most the norm of the perturbation (Weyl): one rounding of each entry, n <= 20 deep
    slack = 20 * torch.finfo(torch.float32).eps * values[0]
    assert ((kept - values[:5]).abs() <= slack).all()
    assert ((rest[: len(values) - 5] - values[5:]).abs() <= slack).all()


def test_olora_starts_with_orthonormal_columns():
    base = nn.Linear(12, 20)
    model = nn.Sequential(base)
    lc.add_adapter(model, lc.LoraConfig(r=5, target_modules=["0"], init_lora_weights="olora"))
    b = model[0].lora_b["default"].detach()
    assert_within_rounding(torch.eye(5), lambda b: b.T @ b, b, depth=20)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_start_from_the_weight_is_undone_by_disabling_and_deleting(init):
    model = nn.Sequential(nn.Linear(12, 20))
    x, old = torch.randn(3, 12), model[0].weight.detach().clone()
    bias = model[0].bias.detach().clone()
    lc.add_adapter(model, lc.LoraConfig(r=4, target_modules=["0"], init_lora_weights=init))
    residual, scaling = model[0].weight.detach().clone(), model[0].adapters["default"].scaling
    start = [t.clone() for t in model[0].start_of("default")]
    with torch.no_grad():
        model[0].lora_b["default"].add_(1)
    with lc.disable_adapter(model):
        y = model(x).detach()

    def whole(residual, a, b):
        return residual + scaling * (b @ a)

    def run(x, bias, residual, a, b):
        return x @ whole(residual, a, b).T + bias

    assert_within_rounding(y, run, x, bias, residual, *start, depth=12 + 4)
    lc.delete_adapter(model, "default")
    assert type(model[0]) is nn.Linear
    assert_within_rounding(model[0].weight.detach(), whole, residual, *start, depth=4 + 1)
    assert_within_rounding(old, whole, residual, *start, depth=4 + 1)


def test_start_from_the_weight_of_an_nf4_base_keeps_the_sum_within_the_cost_of_requantising(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64))
    lc.quantize_model(model, skip_modules=[])
    old = model[0].weight.dequantize(torch.float32)
    lc.add_adapter(model, lc.LoraConfig(r=4, target_modules=["0"], init_lora_weights="pissa"))
    new = model[0].read_weight() + model[0].delta("default")
    # NF4 errs by about a tenth of a Gaussian weight, and the residual is smaller than the weight
    assert 0 < (new - old).norm() < 0.15 * old.norm()
    with pytest.warns(UserWarning, match="started from 4-bit weights.*saved for the original ones"):
        lc.save_adapter(model, tmp_path)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_start_from_the_weight_refuses_what_has_none(init):
    for base in (nn.Embedding(9, 4), nn.Conv1d(3, 4, 2)):
        model = nn.Sequential(base)
        with pytest.raises(lc.ConfigError, match=f"{init}.*{type(base).__name__}"):
            lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0"], init_lora_weights=init))
        assert model[0] is base
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(lc.ConfigError, match="meta device"):
        lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0"], init_lora_weights=init))
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(lc.ConfigError, match="rank of at most 4"):
        lc.add_adapter(model, lc.LoraConfig(r=5, target_modules=["0"], init_lora_weights=init))
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 8}, r"no field 'rank': the rank is called 'r'"),
        ({"use_qalora": True}, r"no field 'use_qalora': PEFT has it, and it is not implemented here"),
        ({"use_rslora": "no"}, "use_rslora is 'no'; want True or False"),
        ({"rank_pattern": None}, "rank_pattern is None; want a dict"),
        ({"alpha_pattern": ["q"]}, r"alpha_pattern is \['q'\]; want a dict"),
        ({"extra": 3}, "extra is 3; want a dict of name to value"),
        ({"extra": {"use_qalora": True}}, "extra sets use_qalora to True.*not implemented here: leave it out"),
        ({"extra": {1: 2}}, r"extra is \{1: 2\}; want strings for keys"),
        ({"rank_pattern": {1: 4}}, r"rank_pattern is \{1: 4\}; want strings for keys"),
        ({"task_type": ["CAUSAL_LM"]}, r"task_type is \['CAUSAL_LM'\]; want a string"),
        ({"target_modules": 5}, "target_modules is 5; want names"),
        ({"target_modules": [0]}, r"target_modules is \[0\]; want names"),
        ({"layers_to_transform": [0.5]}, r"layers_to_transform is \[0.5\]; want the indices"),
        ({"layers_to_transform": "0"}, "layers_to_transform is '0'; want the indices"),
        ({"layers_pattern": "([", "layers_to_transform": 0}, "is no regular expression"),
        ({"layers_pattern": "layers"}, "layers_pattern is 'layers' without layers_to_transform"),
        ({"modules_to_save": ["(["]}, "is no regular expression"),
        ({"lora_alhpa": 8}, r"no field 'lora_alhpa': did you mean 'lora_alpha'"),
        ({"r": 0}, r"rank of 'r' is 0"),
        ({"r": 2.5}, r"rank of 'r' is 2.5"),
        ({"rank_pattern": {"q": -1}}, r"rank of 'q' is -1"),
        ({"lora_alpha": math.inf}, r"alpha of 'lora_alpha' is inf"),
        ({"lora_dropout": 1.0}, r"lora_dropout is 1.0"),
        ({"bias": "some"}, r"bias is 'some'; want one of 'none', 'all', 'lora_only'"),
        ({"use_dora": True}, r"use_dora"),
        ({"init_lora_weights": "eva"}, r"init_lora_weights is 'eva'"),
        ({"init_lora_weights": 0}, r"init_lora_weights is 0; want True, False"),
        ({"init_lora_weights": "pissa", "lora_alpha": -8}, r"alpha of 'lora_alpha' is -8.*want a positive one"),
        ({"init_lora_weights": "pissa_niter_2", "alpha_pattern": {"q": 0}}, r"alpha of 'q' is 0"),
        ({"alpha_pattern": {"q": True}}, r"alpha of 'q' is True"),
        ({"r": True}, r"rank of 'r' is True; want a whole number"),
        ({"exclude_modules": 5}, r"exclude_modules is 5; want names"),
        ({"target_modules": "(q"}, r"no regular expression"),
        ({"modules_to_save": "lm_head"}, r"modules_to_save is the string"),
    ],
)
def test_config_refuses_what_cannot_work(fields, message):
    with pytest.raises(lc.ConfigError, match=message):
        lc.LoraConfig(**fields)


def test_config_keeps_fields_of_peft_that_do_nothing():
    extra = {"use_qalora": False, "layer_replication": [], "revision": "v2"}
    assert lc.LoraConfig(extra=extra).extra == extra


@pytest.mark.parametrize(
    "fields",
    [{"block_size": 48}, {"compute_dtype": torch.int8}, {"compute_dtype": torch.float8_e5m2}, {"blocksize": 64}],
)
def test_nf4_config_refuses_what_cannot_work(fields):
    with pytest.raises(lc.ConfigError, match="NF4Config"):
        lc.NF4Config(**fields)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_start_from_a_tied_weight_is_refused_and_changes_nothing(init):
    model = TinyDecoder(tied=True)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(lc.ConfigError, match="lm_head is tied to embed_tokens.weight.*exclude_modules"):
        lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=init))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_start_that_fails_at_a_later_layer_leaves_every_bit_of_the_earlier(init):
    model = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 3))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(lc.ConfigError, match="want a rank of at most 3"):
        lc.add_adapter(model, lc.LoraConfig(r=8, target_modules=["0", "1"], init_lora_weights=init))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_start_from_four_bits_is_warned_of(init):
    model = lc.quantize_model(nn.Sequential(nn.Linear(32, 32)), skip_modules=[])
    before = {n: t.clone() for n, t in model.state_dict().items()}
    config = lc.LoraConfig(r=2, target_modules=["0"], init_lora_weights=init)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="starts from 4-bit weights.*rounding"):
            lc.add_adapter(model, config)
    # an error, it comes before anything is quantised anew
    assert {n: t.tolist() for n, t in model.state_dict().items()} == {n: t.tolist() for n, t in before.items()}
    with pytest.warns(UserWarning, match="starts from 4-bit weights.*rounding"):
        lc.add_adapter(model, config)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_is_given_back_in_the_precision_of_a_weight_that_became_wider(init):
    model = nn.Sequential(nn.Linear(8, 8))
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0"], init_lora_weights=init))
    model[0].base_layer.double()
    with torch.no_grad():
        model[0].base_layer.weight += 1e-9
    want = model[0].original_weight()
    lc.delete_adapter(model, "default")
    assert torch.equal(model[0].weight, want) and not torch.equal(want, want.float().double())


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_dormant_start_is_added_back_in_the_dtype_of_the_output(init, dtype):
    model = nn.Sequential(nn.Linear(16, 16))
    x = torch.randn(3, 16)
    base = model(x)
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0"], init_lora_weights=init))
    model[0].base_layer.to(dtype)
    with lc.disable_adapter(model):
        y = model(x.to(dtype))
    assert y.dtype == dtype
    # weight, bias, x, both parts and their sum are rounded
    assert (y.float() - base).abs().max() <= 16 * torch.finfo(dtype).eps * base.abs().max()
