"""The adapted layers against their formulas, for every kind of base layer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import randomise
from tolerance import assert_within_rounding
from torch import nn

import lora_core as lc
from lora_core.layers.adapter import AdapterLayer
from lora_core.layers.linear import LoraLinear, LoraTransposedLinear
from lora_core.reference import lora as reference

R = 3


def adapted(base: nn.Module, **config) -> AdapterLayer:
    """Return the base layer adapted, with random A and B."""
    model = nn.Sequential(base)
    lc.add_adapter(model, lc.LoraConfig(r=R, lora_alpha=6, target_modules=["0"], **config))
    randomise(model)
    return model[0]


def linear_truth(x, weight, bias, lora_a, lora_b, scaling):
    y = reference.lora_linear(x, weight, bias, lora_a, lora_b, scaling)
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (0,)], ids=str)
def test_lora_linear_layer_follows_its_formula(dtype, bias, lead):
    layer = adapted(nn.Linear(7, 5, bias=bias).to(dtype))
    x = torch.randn(*lead, 7).to(dtype)
    y = layer(x)
    assert y.dtype == dtype and y.shape == (*lead, 5)
    b = layer.bias if bias else torch.zeros(5, dtype=dtype)
    args = (x, layer.weight.detach(), b, layer.lora_a["default"].detach(), layer.lora_b["default"].detach())
    s = layer.adapters["default"].scaling
    # the base product and the update are each rounded to the output's dtype before they are added
    assert_within_rounding(y.detach(), linear_truth, *args, s, depth=7 + R + 2, intermediates=2)


def test_lora_linear_layer_keeps_adapters_in_float32_over_a_half_precision_base():
    layer = adapted(nn.Linear(7, 5).bfloat16())
    assert layer.lora_a["default"].dtype == layer.lora_b["default"].dtype == torch.float32


def test_lora_linear_layer_adds_several_adapters():
    model = nn.Sequential(nn.Linear(7, 5))
    for name, rank in (("one", 2), ("two", 5)):
        lc.add_adapter(model, lc.LoraConfig(r=rank, target_modules=["0"]), name)
    randomise(model)
    lc.set_adapter(model, ["one", "two"])
    layer, x = model[0], torch.randn(4, 7)

    def both(x, weight, bias, a1, b1, a2, b2):
        s1, s2 = layer.adapters["one"].scaling, layer.adapters["two"].scaling
        return F.linear(x, weight, bias) + s1 * (x @ a1.T) @ b1.T + s2 * (x @ a2.T) @ b2.T

    pairs = [t.detach() for n in ("one", "two") for t in (layer.lora_a[n], layer.lora_b[n])]
    args = (x, layer.weight.detach(), layer.bias.detach(), *pairs)
    assert_within_rounding(model(x).detach(), both, *args, depth=14)


@pytest.mark.parametrize("kind", ["forward_hook", "pre_hook", "subclass", "patched"])
def test_lora_linear_layer_does_not_bypass_a_changed_base(kind):
    """A hook, a subclass or a patched forward changes what the base layer computes; the fused op must not skip it."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    base = Doubled(7, 5) if kind == "subclass" else nn.Linear(7, 5)
    if kind == "forward_hook":
        base.register_forward_hook(lambda module, args, y: 2 * y)
    if kind == "pre_hook":
        base.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    if kind == "patched":
        base.forward = lambda x: 2 * F.linear(x, base.weight, base.bias)
    layer = adapted(base)
    with torch.no_grad():
        layer.lora_b["default"].zero_()
        x = torch.randn(4, 7)
        assert torch.equal(layer(x), base(x))


@pytest.mark.peer("transformers")
def test_lora_transposed_linear_follows_its_formula():
    from transformers.pytorch_utils import Conv1D

    base = Conv1D(5, 7)
    layer = adapted(base)
    assert isinstance(layer, LoraTransposedLinear)
    assert (layer.in_features, layer.out_features) == (7, 5)
    x = torch.randn(2, 3, 7)
    args = (x, base.weight.T, base.bias, layer.lora_a["default"], layer.lora_b["default"])
    s = layer.adapters["default"].scaling
    assert_within_rounding(layer(x).detach(), linear_truth, *(a.detach() for a in args), s, depth=12)


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_lora_embedding_follows_its_formula(padding_idx):
    layer = adapted(nn.Embedding(11, 6, padding_idx=padding_idx))
    tokens = torch.tensor([[0, 2, 10], [5, 5, 1]])
    a, b = layer.lora_a["default"], layer.lora_b["default"]
    assert a.shape == (R, 11) and b.shape == (6, R)

    def truth(weight, a, b, s):
        return weight[tokens] + s * a.T[tokens] @ b.T

    args = (layer.weight.detach(), a.detach(), b.detach(), layer.adapters["default"].scaling)
    assert_within_rounding(layer(tokens).detach(), truth, *args, depth=R + 1)


CONVOLUTIONS = {
    "1d": (nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "1d_stride_dilation": (nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2), (2, 4, 9)),
    "2d": (nn.Conv2d(4, 6, (3, 2), padding=1), (2, 4, 6, 5)),
    "2d_same": (nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 6, 5)),
    "2d_circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 6, 5)),
    "2d_no_bias": (nn.Conv2d(4, 6, 1, bias=False), (2, 4, 6, 5)),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_lora_conv_equals_the_convolution_with_the_summed_weight(kind):
    base, shape = CONVOLUTIONS[kind]
    base = copy.deepcopy(base).double()
    layer = adapted(base)
    x = torch.randn(*shape, dtype=torch.float64)
    y = layer(x)
    merged = copy.deepcopy(base)
    with torch.no_grad():
        merged.weight += layer.delta("default")

    def truth(x, weight):
        other = copy.deepcopy(merged)
        with torch.no_grad():
            other.weight.copy_(weight)
        return other(x)

    # both sides run in float64: one float32 rounding of both stands far above their difference
    assert_within_rounding(y.detach().float(), truth, x, merged.weight.detach(), depth=4 * 9 + R)


def test_lora_conv_with_groups_runs_and_refuses_to_merge():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    lc.add_adapter(model, lc.LoraConfig(r=4, target_modules=["0"]))
    randomise(model)
    assert model(torch.randn(1, 4, 5, 5)).shape == (1, 6, 3, 3)
    with pytest.raises(lc.AdapterError, match="2 groups"):
        lc.merge_adapter(model)


def test_lora_conv_refuses_a_rank_its_groups_do_not_divide():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    with pytest.raises(lc.ConfigError, match="rank 3.*multiple of the groups"):
        lc.add_adapter(model, lc.LoraConfig(r=3, target_modules=["0"]))
    assert type(model[0]) is nn.Conv2d


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nf4_linear_follows_its_formula(dtype, double_quant):
    model = nn.Sequential(nn.Linear(70, 9).to(dtype))
    lc.quantize_model(model, lc.NF4Config(double_quant=double_quant), skip_modules=[])
    lc.add_adapter(model, lc.LoraConfig(r=R, target_modules=["0"]))
    randomise(model)
    layer, x = model[0], torch.randn(4, 70).to(dtype)
    weight = layer.weight.dequantize(dtype)
    a, b = layer.lora_a["default"].detach(), layer.lora_b["default"].detach()
    args = (x, weight, layer.bias.detach(), a, b, layer.adapters["default"].scaling)
    assert_within_rounding(model(x).detach(), linear_truth, *args, depth=70 + R + 2, intermediates=2)


def test_nf4_linear_computes_in_its_compute_dtype_and_answers_in_that_of_x():
    model = nn.Sequential(nn.Linear(64, 8))
    lc.quantize_model(model, lc.NF4Config(compute_dtype=torch.bfloat16), skip_modules=[])
    x = torch.randn(4, 64)
    y = model(x)
    want = F.linear(x.bfloat16(), model[0].weight.dequantize(torch.bfloat16), model[0].bias.bfloat16()).float()
    assert y.dtype == torch.float32
    assert torch.equal(y, want)


def test_nf4_linear_shows_the_weight_attributes_that_other_code_reads():
    model = nn.Sequential(nn.Linear(64, 8).bfloat16())
    lc.quantize_model(model, skip_modules=[])
    lc.add_adapter(model, lc.LoraConfig(target_modules=["0"]))
    weight = model[0].weight
    assert (weight.dtype, weight.device, tuple(weight.shape)) == (torch.bfloat16, torch.device("cpu"), (8, 64))


@pytest.mark.parametrize("kind", ["linear", "nf4", "conv", "embedding"])
def test_layers_run_under_autocast(kind):
    bases = {
        "linear": nn.Linear(64, 8),
        "nf4": nn.Linear(64, 8),
        "conv": nn.Conv1d(4, 6, 3),
        "embedding": nn.Embedding(9, 6),
    }
    model = nn.Sequential(bases[kind])
    if kind == "nf4":
        lc.quantize_model(model, skip_modules=[])
    lc.add_adapter(model, lc.LoraConfig(r=2, lora_dropout=0.1, target_modules=["0"]))
    randomise(model)
    x = {"conv": torch.randn(2, 4, 9), "embedding": torch.tensor([1, 2])}.get(kind, torch.randn(3, 64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == (torch.float32 if kind == "embedding" else torch.bfloat16)
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_dropout_acts_in_training_only_and_on_the_low_rank_path_only():
    layer = adapted(nn.Linear(50, 5), lora_dropout=0.5)
    x = torch.ones(4, 50)
    base = layer.base_layer(x)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    with torch.no_grad():
        layer.lora_b["default"].zero_()
    assert torch.equal(layer(x), base)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_repeats_with_the_seed_and_keeps_the_mean(p):
    layer = adapted(nn.Linear(40, 3), lora_dropout=p).train()
    x = torch.randn(2, 40)
    torch.manual_seed(5)
    first = layer(x)
    torch.manual_seed(5)
    assert torch.equal(first, layer(x))
    with torch.no_grad():
        draws = torch.stack([layer(x) for _ in range(2000)])
        mean, spread = draws.mean(0), draws.std(0) / 2000**0.5
        # six standard errors of the mean: a false alarm in 1e8
        assert ((mean - layer.eval()(x)).abs() <= 6 * spread).all()


def test_dropout_under_checkpointing_gives_the_gradients_without_it():
    from torch.utils.checkpoint import checkpoint

    layer = adapted(nn.Linear(20, 6), lora_dropout=0.3).train()
    x = torch.randn(5, 20)
    grads = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(3)
        layer.zero_grad()
        run(x).square().sum().backward()
        grads.append([p.grad.clone() for p in layer.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_adapted_layer_survives_deepcopy_and_prints_itself():
    layer = adapted(nn.Linear(7, 5))
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 7)
    assert torch.equal(twin(x), layer(x))
    assert "default: r=3, scaling=2" in repr(layer)
    assert isinstance(twin, LoraLinear) and twin.lora_a["default"] is not layer.lora_a["default"]


@pytest.mark.parametrize("dynamic", [False, True])
def test_adapted_model_compiles_without_a_graph_break(dynamic):
    model = nn.Sequential(nn.Linear(7, 5), nn.GELU(), nn.Linear(5, 7))
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0", "2"]))
    randomise(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    x = torch.randn(4, 7)
    assert torch.equal(compiled(x), model(x))


def test_conv_drops_in_training_only():
    model = nn.Sequential(nn.Conv1d(4, 4, 3))
    lc.add_adapter(model, lc.LoraConfig(r=2, lora_dropout=0.5, target_modules=["0"]))
    randomise(model)
    x = torch.randn(2, 4, 64)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_the_row_of_padding_takes_no_gradient():
    """As in the embedding itself: what stands for no token is not trained."""
    model = nn.Sequential(nn.Embedding(11, 6, padding_idx=2))
    lc.add_adapter(model, lc.LoraConfig(r=3, target_modules=["0"]))
    randomise(model)
    model(torch.tensor([2, 5, 2])).sum().backward()
    trained = model[0].lora_a["default"].grad.abs().sum(0) > 0
    assert trained.nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("half", ["lora_a", "lora_b"])
def test_matrix_on_another_device_than_its_input_is_refused(half):
    model = nn.Sequential(nn.Linear(6, 5))
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0"]))
    matrices = getattr(model[0], half)
    matrices["default"] = nn.Parameter(matrices["default"].to("meta"))
    with pytest.raises(lc.DeviceError, match="adapter 'default': .* on meta.*want one device"):
        model(torch.randn(3, 6))
