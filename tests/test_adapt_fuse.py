"""fuse and unfuse: own, PEFT's and bitsandbytes' layers, the same results, the same objects."""

import copy
import pickle

import bitsandbytes as bnb
import peft
import pytest
import torch
from lora_bounds import check_backward, check_forward
from models import randomise
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_core as lc
from lora_core.layers.fused import Fused
from lora_core.ops.lora_linear import op
from lora_core.quant import QuantizedWeight

pytestmark = [
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


def in_four_bits(model, **fields):
    for name in TARGETS:
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
    check_backward(grads, d_y, None, x, weight, lora_a, lora_b, hidden, scaling)


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


def steps(model, optimiser, count):
    found = []
    g = torch.Generator().manual_seed(5)
    for _ in range(count):
        x, want = torch.randn(8, WIDTH, generator=g), torch.randn(8, 7, generator=g)
        loss = (model(x) - want).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("name", ["own", "own nf4", "peft", "peft 4-bit"])
def test_an_optimiser_from_before_fuse_goes_on_as_without(name):
    """Losses follow the unfused run as near as it follows itself from weights moved by one unit in the last place."""
    curves = []
    for fused, end in ((False, None), (True, None), *((False, end) for end in (torch.inf, -torch.inf))):
        model = MAKERS[name]().train()
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for parameter in trained if end is not None else ():
                parameter.copy_(torch.nextafter(parameter, torch.tensor(end)))
        optimiser = torch.optim.AdamW(trained, lr=1e-2)
        first = steps(model, optimiser, 2)
        if fused:
            lc.fuse(model)
        curves.append(torch.cat([first, steps(model, optimiser, 6)]))
    plain, fused, *nudged = curves
    spread = torch.stack([(curve - plain).abs() for curve in nudged]).max(0).values.cummax(0).values
    assert plain[-1] < plain[0]
    assert bool(((fused - plain).abs() <= 2 * (spread + torch.finfo(torch.float32).eps * plain)).all())


def test_peft_goes_on_with_a_fused_model():
    """Disabling, switching, merging, unloading and saving do what they do without."""
    model, x = with_peft(Projections()).eval(), torch.randn(4, WIDTH)
    model.add_adapter("other", peft.LoraConfig(target_modules=TARGETS, r=3))
    randomise(model)
    plain = copy.deepcopy(model)
    assert len(lc.fuse(model).swapped) == 2
    with model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(model(x), plain(x))
    layer, other = (m.base_model.model.q_proj for m in (model, plain))
    mixed = {"adapter_names": ["default", "__base__", "other", "default"]}
    assert torch.equal(layer(x, **mixed), other(x, **mixed))
    for both in (model, plain):
        both.set_adapter("other")
    base, pair = layer.base_layer, (layer.lora_A["other"].weight, layer.lora_B["other"].weight)
    check_forward(layer(x).detach(), x, base.weight, base.bias, *pair, layer.scaling["other"])
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.merge_adapter(), plain.merge_adapter()
    assert torch.equal(model(x), plain(x))
    model.unmerge_adapter(), plain.unmerge_adapter()
    assert torch.equal(model.merge_and_unload()(x), plain.merge_and_unload()(x))


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


def test_fused_model_trains_under_checkpointing_as_without():
    model = with_peft(Projections(), lora_dropout=0.3).train()
    lc.fuse(model)
    x = torch.randn(5, WIDTH)
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(0)
        grads.append(torch.autograd.grad(run(x).square().sum(), trained))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("name", ["own", "peft", "peft 4-bit", "bitsandbytes"])
def test_fused_model_compiles_without_a_graph_break(name):
    model = MAKERS[name]().eval()
    lc.fuse(model)
    x = torch.randn(5, WIDTH)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("name", MAKERS)
def test_fused_model_runs_under_autocast_as_in_half_precision(name):
    model = MAKERS[name]()
    lc.fuse(model)
    x = torch.randn(5, WIDTH)
    with torch.autocast("cpu", dtype=HALF):
        fused = model(x)
        lc.unfuse(model)
        plain = model(x)
    assert fused.dtype == plain.dtype
    # both round at every layer: a few of 256 steps apart at the size of the output
    assert (fused - plain).abs().max() <= 8 * torch.finfo(HALF).eps * plain.abs().max()


@pytest.mark.parametrize("name", ["own", "peft", "bitsandbytes"])
def test_fused_model_can_be_copied_and_pickled(name):
    model = MAKERS[name]().eval()
    lc.fuse(model)
    x = torch.randn(5, WIDTH)
    duplicate = copy.deepcopy(model)
    assert torch.equal(duplicate(x), model(x))
    with torch.no_grad():
        next(p for n, p in duplicate.named_parameters() if "bias" in n).add_(1)
    assert not torch.equal(duplicate(x), model(x))
    layer = next(m for m in model.modules() if isinstance(m, Fused))
    if name != "peft":
        back = pickle.loads(pickle.dumps(layer))
        assert type(back) is type(layer) and torch.equal(back(x), layer(x))
    lc.unfuse(duplicate)
    assert not any(isinstance(m, Fused) for m in duplicate.modules())


def skipped(model):
    return {n.rpartition(".")[2]: reason for n, reason in lc.fuse(model).skipped.items() if reason != NOTHING}


def hooked(model):
    model.get_submodule("base_model.model.q_proj.base_layer").register_forward_hook(lambda *args: None)
    return model


def patched(model):
    layer = model.get_submodule("base_model.model.q_proj")
    layer.forward = layer.forward
    return model


REASONS = {
    "dora": (lambda: with_peft(Projections(), use_dora=True), "Dora", 2),
    "lora bias": (lambda: with_peft(Projections(), lora_bias=True), "has a bias", 2),
    "hooks": (lambda: hooked(with_peft(Projections())), "its base layer has hooks", 1),
    "patched forward": (lambda: patched(with_peft(Projections())), "patched on the layer itself", 1),
    "fp4": (lambda: in_four_bits(Projections(), quant_type="fp4"), "its quant_type is 'fp4'", 2),
    "peft fp4": (lambda: with_peft(in_four_bits(Projections(), quant_type="fp4")), "its quant_type is 'fp4'", 2),
    "not quantised": (lambda: nn.Sequential(bnb.nn.Linear4bit(64, 8)), "not quantised yet", 1),
    "8-bit": (lambda: nn.Sequential(bnb.nn.Linear8bitLt(64, 8)), "Linear8bitLt has no fused operation", 1),
}


@pytest.mark.parametrize("case", REASONS)
def test_fuse_says_why_it_skips_a_layer(case):
    make, reason, count = REASONS[case]
    model = make()
    before = [type(m) for m in model.modules()]
    found = skipped(model)
    assert len(found) == count and all(reason in why for why in found.values())
    assert sum(type(m) is not b for m, b in zip(model.modules(), before, strict=True)) == len(
        [m for m in model.modules() if isinstance(m, Fused)]
    )


def test_fuse_skips_layers_whose_class_has_a_forward_of_its_own():
    class Doubled(bnb.nn.Linear4bit):
        def forward(self, x):
            return 2 * super().forward(x)

    for wrap in (nn.Sequential, lambda layer: with_peft(nn.Sequential(layer), target_modules=["0"])):
        layer = linear4bit(nn.Linear(WIDTH, 8))
        layer.__class__ = Doubled
        report = lc.fuse(wrap(layer))
        assert report.swapped == [] and "a forward of its own" in str(report)


@pytest.mark.parametrize("name", ["own", "peft", "peft 4-bit", "bitsandbytes"])
def test_fuse_takes_a_single_layer(name):
    layer = next(m for n, m in MAKERS[name]().named_modules() if n.endswith("q_proj"))
    report = lc.fuse(layer)
    assert report.swapped == [""] and report.skipped == {}
    check_layer(layer, torch.float32)


def test_unfuse_refuses_a_layer_whose_class_was_swapped_again():
    model = own()
    lc.fuse(model)
    model.q_proj.__class__ = type("Wrapped", (type(model.q_proj),), {})
    with pytest.raises(lc.AdapterError, match="q_proj has become a Wrapped since it was fused"):
        lc.unfuse(model)
    assert isinstance(model.up_proj, Fused)


def test_fuse_skips_embeddings_convolutions_and_other_tuners():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.conv, self.linear = nn.Embedding(5, 8), nn.Conv1d(8, 8, 3), nn.Linear(8, 8)

    mine = lc.add_adapter(Odd(), lc.LoraConfig(target_modules=["embed", "conv", "linear"]))
    report = lc.fuse(mine)
    assert report.swapped == ["linear"] and set(report.skipped) == {"embed", "conv"}
    theirs = with_peft(Odd(), target_modules=["embed", "conv", "linear"])
    report = lc.fuse(theirs)
    assert len(report.swapped) == 1 and len(report.skipped) == 2
    other = peft.get_peft_model(Odd(), peft.IA3Config(target_modules=["linear"], feedforward_modules=[]))
    assert "is no LoRA layer" in str(lc.fuse(other))


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


def test_fuse_of_a_model_without_such_layers_reports_nothing():
    report = lc.fuse(nn.Sequential(nn.LayerNorm(4), nn.GELU()))
    assert report.swapped == [] and report.skipped == {}
    assert str(report) == "0 layers fused, 0 left as they are"


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


def test_adapters_on_a_model_fused_before_are_fused():
    model = lc.quantize_model(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), skip_modules=[])
    lc.fuse(model)
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0", "1"]))
    wanted = model(torch.ones(2, 64))
    assert lc.fuse(model).swapped == ["0", "1"] and all(layer.is_as_written() for layer in model)
    assert torch.equal(model(torch.ones(2, 64)), wanted)
