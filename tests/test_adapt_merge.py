"""Merging adapters into the weights, and out again bit for bit."""

import collections
import copy

import pytest
import torch
from models import TinyDecoder, randomise, tokens
from tolerance import assert_same_function, assert_within_rounding
from torch import nn
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import lora_core as lc
from lora_core.adapt import merge
from lora_core.adapt.walk import adapter_layers
from lora_core.layers.adapter import AdapterLayer
from lora_core.layers.nf4_linear import NF4Linear
from lora_core.quant import quantize

TARGETS = {
    "linear": r".*_proj",
    "embedding": ["embed_tokens"],
    "everything": r".*(_proj|embed_tokens|lm_head)",
}


def adapted(dtype=torch.float32, targets=TARGETS["linear"], quantized=False):
    model = TinyDecoder().to(dtype)
    if quantized:
        lc.quantize_model(model)
    lc.add_adapter(model, lc.LoraConfig(r=2, lora_alpha=4, target_modules=targets))
    randomise(model, 0.1)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("targets", TARGETS)
def test_merged_weight_is_the_sum_rounded_once(dtype, targets):
    model = adapted(dtype, TARGETS[targets])
    parts = {
        n: (m.weight.detach().clone(), m.lora_a["default"].detach(), m.lora_b["default"].detach(), m)
        for n, m in adapter_layers(model).items()
    }
    lc.merge_adapter(model)
    for weight, a, b, layer in parts.values():
        scaling = layer.adapters["default"].scaling

        def total(weight, a, b, layer=layer, scaling=scaling):
            return weight + scaling * layer.product(a, b)

        got = layer.weight.detach()
        got = got.float() if dtype == torch.float64 else got
        assert_within_rounding(got, total, weight, a, b, depth=2 + 1)


@pytest.mark.parametrize(
    ("dtype", "quantized"),
    [
        (torch.float32, False),
        (torch.bfloat16, False),
        (torch.float64, False),
        (torch.float32, True),
        (torch.bfloat16, True),
    ],
    ids=str,
)
def test_unmerging_restores_every_bit(dtype, quantized):
    model = adapted(dtype, quantized=quantized)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = model(tokens())
    for _ in range(3):
        lc.merge_adapter(model)
        assert not torch.equal(model(tokens()), before)
        lc.unmerge_adapter(model)
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[k], state[k]) for k in state)
    assert torch.equal(model(tokens()), before)


def test_merging_several_adapters_rounds_their_sum_once():
    model = adapted()
    lc.add_adapter(model, lc.LoraConfig(r=5, target_modules=["q_proj"]), "other")
    randomise(model, 0.1)
    layer = model.layers[0].attn.q_proj
    want = layer.weight.double() + layer.delta("default").double() + layer.delta("other").double()
    report = lc.merge_adapter(model, ["default", "other"])
    assert report.names == ("default", "other")
    assert torch.equal(layer.weight, want.to(layer.weight.dtype))


class Made(TorchDispatchMode):
    """Counts the elements of the largest tensor that operations make, by dtype."""

    def __init__(self):
        super().__init__()
        self.most = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(made):
            if isinstance(t, torch.Tensor):
                self.most[t.dtype] = max(self.most[t.dtype], t.numel())
        return made


@pytest.mark.parametrize("verb", [lc.merge_adapter, lc.merge_and_unload])
def test_merging_makes_an_update_once_and_nothing_wider_of_a_whole_weight(monkeypatch, verb):
    monkeypatch.setattr(merge, "COMPARED", 128)
    model = adapted(torch.bfloat16)
    layers = len(adapter_layers(model))
    asked = []
    delta = AdapterLayer.delta
    monkeypatch.setattr(AdapterLayer, "delta", lambda self, name: asked.append(name) or delta(self, name))
    with Made() as made:
        verb(model)
    assert len(asked) == layers
    assert made.most[torch.float64] <= 128 < made.most[torch.float32]


def test_an_update_that_overflows_is_found_although_a_bound_passes_most_by():
    """max|A| max|B| r s is far above the largest number where no product is, and not below it where one is."""
    model = adapted(torch.float16)
    layer = model.layers[0].attn.q_proj
    with torch.no_grad():
        layer.lora_a["default"].zero_()[0, 0] = 1e4
        layer.lora_b["default"].zero_()[0, -1] = 1e4
    assert layer.delta_bound("default") > torch.finfo(torch.float16).max
    lc.merge_adapter(model)
    lc.unmerge_adapter(model)
    with torch.no_grad():
        layer.lora_b["default"][0, 0] = 1e4
    with pytest.raises(lc.NonFiniteError, match="too large for the dtype"):
        lc.merge_adapter(model)


def test_merging_matrices_of_less_precision_keeps_that_of_the_weight():
    model = adapted(torch.float64)
    layer = model.layers[0].attn.q_proj
    for matrices in (layer.lora_a, layer.lora_b):
        matrices.float()
    want = layer.weight + layer.delta("default").double()
    lc.merge_adapter(model)
    assert torch.equal(layer.weight, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_an_update_by_matrices_in_half_precision_is_computed_in_float32(dtype):
    config = lc.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"])
    model = lc.add_adapter(TinyDecoder().to(dtype), config, autocast_adapter_dtype=False)
    randomise(model, 0.1)
    layer = model.layers[0].attn.q_proj
    a, b = (matrices["default"].detach() for matrices in (layer.lora_a, layer.lora_b))
    assert a.dtype == b.dtype == dtype
    want = (layer.weight.float() + 2 * (b.float() @ a.float())).to(dtype)
    lc.merge_adapter(model)
    assert torch.equal(layer.weight, want)


def test_report_measures_the_error_against_float64():
    model = adapted(torch.bfloat16)
    layer = model.layers[0].attn.q_proj
    truth = layer.weight.double() + layer.delta("default").double()
    report = lc.merge_adapter(model)
    error = layer.weight.double() - truth
    row = report.layers["layers.0.attn.q_proj"]
    assert row.relative_error == (error.norm() / truth.norm()).item()
    assert row.largest_error == error.abs().max().item()
    assert not row.requantized and len(report.layers) == 12
    # a rounding to bfloat16 errs by at most 2^-9 of the value
    assert 0 < report.worst < 2**-9
    held = sum(2 * m.weight.numel() for m in adapter_layers(model).values())
    assert report.backup_bytes == held
    assert "12 layers" in str(report)


def test_report_is_as_bad_as_the_worst_of_its_layers():
    model = adapted(torch.bfloat16)
    # without an update there is nothing to round
    nn.init.zeros_(model.layers[0].attn.q_proj.lora_b["default"])
    report = lc.merge_adapter(model)
    errors = [row.relative_error for row in report.layers.values()]
    assert 0 == min(errors) < report.worst == max(errors)
    assert f"at most {max(errors):.2e}" in str(report)


def test_report_of_an_nf4_merge_says_what_requantising_cost():
    model = adapted(quantized=True)
    layer = model.layers[0].up_proj
    truth = layer.read_weight().double() + layer.delta("default").double()
    report = lc.merge_adapter(model)
    row = report.layers["layers.0.up_proj"]
    assert row.requantized
    assert row.relative_error == ((layer.read_weight().double() - truth).norm() / truth.norm()).item()
    # NF4 with blocks of 64 errs by about a tenth on a Gaussian weight: much more than any rounding
    assert 0.01 < row.relative_error < 0.2
    assert "requantised" in str(report)


@pytest.mark.parametrize("nested_block_size", [1, 100, 128, 4096])
def test_merging_keeps_the_format_of_the_scales(nested_block_size):
    q = quantize(torch.randn(64, 1024), nested_block_size=nested_block_size)
    layer, before = NF4Linear(q), q.dequantize()
    model = lc.add_adapter(nn.Sequential(layer), lc.LoraConfig(r=2, target_modules=["0"]))
    randomise(model)
    report = lc.merge_adapter(model)
    assert report.layers["0"].relative_error < 0.2 and not torch.equal(q.dequantize(), before)
    assert q.nested_block_size == nested_block_size and len(q.nested_absmax) == -(-1024 // nested_block_size)
    lc.unmerge_adapter(model)
    assert torch.equal(q.dequantize(), before)


def test_backup_stays_out_of_the_state_dict():
    model = adapted()
    keys = set(model.state_dict())
    lc.merge_adapter(model)
    assert set(model.state_dict()) == keys


def test_merged_adapters_take_no_gradient_until_unmerged():
    model = adapted().train()
    lc.merge_adapter(model)
    assert not any(p.requires_grad for p in model.parameters())
    lc.unmerge_adapter(model)
    assert sum(p.requires_grad for p in model.parameters()) == 24


@pytest.mark.parametrize("prepare", [lambda model: None, TinyDecoder.requires_grad_], ids=["frozen", "whole"])
def test_a_backward_while_merged_is_refused_in_training(prepare):
    """Else nothing would be trained, without a word; in eval mode a gradient of the input is one."""
    model = adapted(targets=TARGETS["everything"]).train()
    lc.merge_adapter(model)
    prepare(model)
    with pytest.raises(lc.AdapterError, match=r"cannot train while \['default'\] is merged.*call unmerge_adapter"):
        model(tokens()).sum().backward()
    with torch.no_grad():
        assert not model(tokens()).requires_grad
    lc.unmerge_adapter(model)
    model(tokens()).sum().backward()


@pytest.mark.parametrize("train", [False, True])
def test_a_merged_adapter_that_is_not_trained_lets_a_gradient_through(train, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 2))
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0", "3"]))
    lc.merge_adapter(model)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    # what comes behind may change the output in place
    assert model.train()(x).requires_grad
    if train:
        lc.unmerge_adapter(model)
        lc.save_adapter(model, tmp_path)
        lc.delete_adapter(model, "default")
        lc.load_adapter(model, tmp_path)
        lc.merge_adapter(model)
    model.train(train)(x).sum().backward()
    assert x.grad is not None


def test_what_looks_at_a_merged_model_in_training_mode_goes_on():
    model = lc.add_adapter(nn.Sequential(nn.Linear(8, 8)), lc.LoraConfig(r=2, target_modules=["0"])).train()
    lc.merge_adapter(model)
    x = torch.randn(3, 8)
    assert torch.equal(torch.jit.trace(model, (x,))(x), model(x))
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(model(forward_ad.make_dual(x, x))).tangent is not None
    nested = torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged)
    assert torch.equal(model(nested).values(), model(torch.cat([x, x[:2]])))


def test_merge_and_unload_leaves_plain_layers():
    model = adapted(targets=TARGETS["everything"])
    kinds = [type(m) for m in TinyDecoder().modules()]
    twin = copy.deepcopy(model)
    lc.merge_adapter(twin)
    assert lc.merge_and_unload(model) is model
    assert [type(m) for m in model.modules()] == kinds
    assert set(model.state_dict()) == set(TinyDecoder().state_dict())
    assert torch.equal(model(tokens()), twin(tokens()))
    # an already merged model unloads to the same
    assert torch.equal(lc.merge_and_unload(twin)(tokens()), model(tokens()))


def test_merge_and_unload_keeps_the_trained_copies():
    model = TinyDecoder()
    lc.add_adapter(model, lc.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]))
    with torch.no_grad():
        model.norm.copies["default"].weight.fill_(3)
    lc.merge_and_unload(model)
    assert type(model.norm) is nn.LayerNorm and (model.norm.weight == 3).all()
    # frozen, as the layers that were merged are
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_merge_and_unload_of_one_adapter_drops_the_others():
    model = adapted()
    want = copy.deepcopy(model)
    lc.add_adapter(model, lc.LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "other")
    lc.merge_and_unload(model, "default")
    assert torch.equal(model(tokens()), lc.merge_and_unload(want)(tokens()))


@pytest.mark.parametrize("verb", [lc.merge_adapter, lc.merge_and_unload])
def test_merging_a_tied_weight_is_refused_and_changes_nothing(verb):
    model = TinyDecoder(tied=True)
    lc.add_adapter(model, lc.LoraConfig(target_modules=["embed_tokens", "q_proj"]))
    randomise(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(lc.AdapterError, match=r"embed_tokens: its weight is tied to lm_head.weight"):
        verb(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_tied_weight_that_another_adapter_is_for_does_not_stop_a_merge():
    model = TinyDecoder(tied=True)
    for name, target in (("of the tied", "embed_tokens"), ("of others", "q_proj")):
        lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=[target]), name)
    assert set(lc.merge_adapter(model, "of others").layers) == {f"layers.{i}.attn.q_proj" for i in range(3)}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_merging_a_broken_adapter_is_refused_and_changes_nothing(value):
    model = adapted(torch.float16)
    with torch.no_grad():
        model.layers[2].down_proj.lora_b["default"].fill_(value)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(lc.NonFiniteError, match=r"layers.2.down_proj.*float16"):
        lc.merge_adapter(model)
    assert all(torch.equal(v.nan_to_num(), state[k].nan_to_num()) for k, v in model.state_dict().items())
    assert not any(layer.merged for layer in adapter_layers(model).values())


def test_merging_twice_and_unmerging_nothing_are_refused():
    model = adapted()
    with pytest.raises(lc.AdapterError, match="nothing is merged"):
        lc.unmerge_adapter(model)
    lc.merge_adapter(model)
    with pytest.raises(lc.AdapterError, match="cannot merge while .* is merged into the weights"):
        lc.merge_adapter(model)
    lc.unmerge_adapter(model)
    lc.set_adapter(model, [])
    with pytest.raises(lc.AdapterError, match="no adapter is active"):
        lc.merge_adapter(model)


@pytest.mark.parametrize("verb", [lc.merge_adapter, lc.merge_and_unload])
def test_refused_merge_keeps_the_other_adapters(verb):
    model = adapted()
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["q_proj"]), "bad")
    next(iter(adapter_layers(model).values())).lora_b["bad"].data.fill_(float("nan"))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(lc.NonFiniteError, match="nothing was changed"):
        verb(model, "bad")
    after = model.state_dict()
    assert state.keys() == after.keys()
    assert all(torch.equal(after[k].nan_to_num(7.0), v.nan_to_num(7.0)) for k, v in state.items())


def test_merging_into_a_base_that_is_broken_blames_the_base():
    model = adapted()
    next(iter(adapter_layers(model).values())).base_layer.weight.data[0, 0] = float("nan")
    with pytest.raises(lc.NonFiniteError, match="the base weight of .* holds NaN or infinity already"):
        lc.merge_adapter(model)


def test_merging_while_disabled_is_refused():
    model = adapted()
    with lc.disable_adapter(model), pytest.raises(lc.AdapterError, match="outside the disable_adapter block"):
        lc.merge_adapter(model)
    lc.merge_adapter(model)


def test_merging_into_an_embedding_with_max_norm_is_refused():
    model = lc.add_adapter(nn.Sequential(nn.Embedding(11, 8, max_norm=1.0)), lc.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(lc.AdapterError, match="max_norm=1"):
        lc.merge_adapter(model)


def test_merging_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = lc.add_adapter(nn.Sequential(nn.Linear(8, 8)), lc.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(lc.AdapterError, match="meta device"):
        lc.merge_adapter(model)


def test_merging_nothing_into_a_weight_of_zeros_is_exact():
    """As a layer starts that is to add nothing at first: there is no norm to relate an error to."""
    model = nn.Sequential(nn.Linear(4, 4))
    nn.init.zeros_(model[0].weight)
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0"]))
    report = lc.merge_adapter(model)
    assert (report.layers["0"].relative_error, report.layers["0"].largest_error) == (0, 0)


def test_merging_an_adapter_that_is_in_no_weight_is_exact():
    model = adapted()
    lc.add_adapter(model, lc.LoraConfig(modules_to_save=["norm"]), "whole")
    report = lc.merge_adapter(model, "whole")
    assert report.layers == {} and report.worst == 0 and "into 0 layers" in str(report)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_merging_an_adapter_that_started_from_the_weight_keeps_the_function(start):
    """What the start took out of the weight is owed by a model that runs without the adapter, and by no other."""
    model = TinyDecoder().double()
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=TARGETS["linear"], init_lora_weights=start))
    randomise(model)
    before = model(tokens())
    lc.merge_adapter(model)
    assert_same_function(model(tokens()), before)
    with lc.disable_adapter(model):
        base = model(tokens())
    lc.unmerge_adapter(model)
    with lc.disable_adapter(model):
        assert_same_function(base, model(tokens()))
    lc.set_adapter(model, "default")
    assert_same_function(lc.merge_and_unload(model)(tokens()), before)


@pytest.mark.parametrize(
    ("base", "pair", "size", "alpha"),
    [(torch.float32, torch.float32, 2e19, 1e-8), (torch.bfloat16, torch.float32, 2e19, 1e-8)]
    + [(torch.float64, torch.float32, 1e25, 4)],
    ids=str,
)
@pytest.mark.parametrize("verb", [lc.merge_adapter, lc.merge_and_unload])
def test_a_product_that_overflows_before_it_is_scaled_is_refused(verb, base, pair, size, alpha):
    model = nn.Sequential(nn.Linear(4, 4).to(base))
    lc.add_adapter(model, lc.LoraConfig(r=2, lora_alpha=alpha, target_modules=["0"]))
    for matrices in (model[0].lora_a, model[0].lora_b):
        matrices["default"] = nn.Parameter(
            torch.full((2, 4) if matrices is model[0].lora_a else (4, 2), size, dtype=pair)
        )
    before = model[0].weight.clone()
    with pytest.raises(lc.NonFiniteError, match="nothing was changed"):
        verb(model)
    assert torch.equal(model[0].weight, before)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize("sides", [(0, 4), (4, 0)])
def test_a_weight_without_elements_is_merged(sides):
    model = nn.Sequential(nn.Linear(*sides))
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0"]))
    assert lc.merge_adapter(model).worst == 0
    lc.unmerge_adapter(model)
