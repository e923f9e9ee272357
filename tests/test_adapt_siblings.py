"""Layers that share their input: each computes what it does alone."""

import copy
import gc
import weakref

import fusible
import peft
import pytest
import torch
from fusible import in_four_bits
from lora_bounds import check_forward
from models import TINY, randomise, transformers_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lora_core as lc
from lora_core.layers.fused import Fused

pytestmark = [
    pytest.mark.peer("bitsandbytes", "peft", "transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*"),
]

WIDTH = 64
# just enough to share
ROWS = 65
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


class Attention(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.v_proj = (nn.Linear(WIDTH, 40, bias=b, dtype=dtype) for b in (True, False))
        self.k_proj, self.o_proj = nn.Linear(WIDTH, 40, dtype=dtype), nn.Linear(40, WIDTH, dtype=dtype)

    def forward(self, x):
        mixed = torch.tanh(self.q_proj(x)) * self.k_proj(x)
        return self.o_proj(mixed + self.v_proj(x))


def own(quantised=False, dtype=torch.float32, **config):
    model = Attention(dtype)
    if quantised:
        lc.quantize_model(model)
    lc.add_adapter(model, lc.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, **config))
    randomise(model)
    return model


def with_peft(model=None, **config):
    return fusible.with_peft(model or Attention(), **{"target_modules": TARGETS, **config})


HALF = torch.bfloat16
# layers of this size, cut in another way or by another library, round apart by a few units of the largest result
APART = 64 * torch.finfo(torch.float32).eps
MAKERS = {
    "own": own,
    "own nf4": lambda: own(quantised=True),
    "own bf16": lambda: own(dtype=HALF),
    "peft": with_peft,
    "peft bf16": lambda: with_peft(Attention(HALF)),
    "peft 4-bit": lambda: with_peft(in_four_bits(Attention(), TARGETS)),
    "peft 4-bit bf16": lambda: with_peft(in_four_bits(Attention(HALF), TARGETS)),
}


class Calls(TorchDispatchMode):
    """Counts calls of this library's linear operations."""

    def __init__(self):
        super().__init__()
        self.together = self.alone = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        self.together += name == "lora_core.lora_linears.default"
        self.alone += name in ("lora_core.lora_linear.default", "lora_core.nf4_lora_linear.default")
        return func(*args, **(kwargs or {}))


def inputs(dtype=torch.float32, seed=1):
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def attention(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def gradients(model, x):
    x = x.clone().requires_grad_()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    y = model(x)
    grads = torch.autograd.grad(y.float().square().sum(), [x, *trained.values()], allow_unused=True)
    return y.detach(), {n: g for n, g in zip(["x", *trained], grads, strict=True) if g is not None}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_siblings_read_x_once_and_give_the_results_of_layers_alone(name, train):
    model = MAKERS[name]().train(train)
    report = lc.fuse(model)
    (group,) = report.shared
    assert [name.rpartition(".")[2] for name in group] == ["q_proj", "k_proj", "v_proj"]
    dtype = HALF if "bf16" in name else torch.float32
    x = inputs(dtype)
    with Calls() as calls:
        y, grads = gradients(model, x)
    assert (calls.together, calls.alone) == (1, 1)
    separate = copy.deepcopy(model)
    for module in separate.modules():
        module.__dict__.pop("siblings", None)
    with Calls() as calls:
        y_alone, grads_alone = gradients(separate, x)
    assert (calls.together, calls.alone) == (0, 4)
    # a product cut another way may sum in another order
    unit = torch.finfo(dtype).eps
    assert (y - y_alone).abs().max() <= 8 * unit * y_alone.abs().max()
    for name, want in grads_alone.items():
        assert grads[name].dtype == want.dtype
        assert (grads[name] - want).abs().max() <= 16 * unit * want.abs().max(), name


@pytest.mark.parametrize("name", ["own", "peft"])
def test_an_output_belongs_to_the_tensor_it_was_computed_from(name):
    """Another tensor, a changed one, another order, and calls that skip a layer: every layer answers for its own x."""
    model = MAKERS[name]().eval()
    lc.fuse(model)
    parent = attention(model)
    q, k, v = parent.q_proj, parent.k_proj, parent.v_proj

    def check(layer, x):
        if name == "own":
            pair = layer.lora_a["default"], layer.lora_b["default"], layer.adapters["default"].scaling
        else:
            pair = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
        base = layer.base_layer
        check_forward(layer(x).detach(), x, base.weight, base.bias, *pair)

    x, other = inputs(), inputs(seed=2)
    for layer, given in ((q, x), (k, other), (v, x), (v, x), (q, other), (q, x), (k, x), (k, x), (v, x)):
        check(layer, given)
    q(x)
    x.mul_(2)
    check(k, x)
    check(v, x)
    with torch.inference_mode():
        same = torch.ones(ROWS, WIDTH)
        for layer in (q, k, v):
            check(layer, same)


def test_few_rows_are_computed_alone():
    model = own().eval()
    lc.fuse(model)
    for x in (inputs()[:-1], inputs()[0], inputs()[:0]):
        with Calls() as calls:
            model(x)
        assert (calls.together, calls.alone) == (0, 4)


def test_siblings_keep_nothing_once_every_output_is_handed_out():
    model = own().eval()
    lc.fuse(model)
    x = inputs()
    model(x)
    siblings = model.q_proj.siblings
    assert siblings._held is None
    # what was not asked for is let go at the next call, and x itself is kept by nothing but the graph
    with torch.no_grad():
        model.q_proj(x)
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None
    model(inputs())
    assert siblings._held is None


def test_siblings_do_not_keep_a_model_alive_or_in_its_state():
    model = own()
    keys, names = list(model.state_dict()), [n for n, _ in model.named_modules()]
    lc.fuse(model)
    assert list(model.state_dict()) == keys and [n for n, _ in model.named_modules()] == names
    siblings, layer = model.q_proj.siblings, model.q_proj
    assert siblings.members[0] is layer
    del model.k_proj
    # a member is gone: the others go on alone
    assert len(siblings.members) == 2
    check_forward(
        layer(inputs()).detach(),
        inputs(),
        layer.base_layer.weight,
        layer.base_layer.bias,
        layer.lora_a["default"],
        layer.lora_b["default"],
        1.5,
    )


@pytest.mark.parametrize("name", ["own", "peft"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_siblings_train_under_checkpointing_as_without(name, reentrant):
    config = {"lora_dropout": 0.3}
    model = (own(**config) if name == "own" else with_peft(**config)).train()
    lc.fuse(model)
    check_checkpointed(model, reentrant)


def check_checkpointed(model, reentrant):
    """Fail unless gradients are the same bits with checkpointing; return the calls of either forward."""
    trained = [p for p in model.parameters() if p.requires_grad]
    grads, counts = [], []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        torch.manual_seed(0)
        model.zero_grad()
        with Calls() as calls:
            y = run(inputs().requires_grad_())
        y.square().sum().backward()
        grads.append([p.grad.clone() for p in trained])
        counts.append(calls)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    return counts


class Drawing(Attention):
    """Draws random numbers between the calls of layers that share their input."""

    def forward(self, x):
        mixed = torch.nn.functional.dropout(self.q_proj(x), 0.5) * self.k_proj(x)
        return self.o_proj(mixed + self.v_proj(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_siblings_with_dropout_draw_their_masks_where_they_are_called(reentrant):
    """Else the same call without gradients, as reentrant checkpointing makes it, would draw others."""
    config = lc.LoraConfig(r=4, target_modules=TARGETS, lora_dropout=0.3)
    model = lc.add_adapter(Drawing(), config)
    randomise(model)
    lc.fuse(model)
    for calls in check_checkpointed(model, reentrant):
        assert calls.together == 0 and calls.alone == 4


def test_a_hook_before_a_sibling_runs_before_its_operands_are_read():
    """As FSDP's, which gathers them."""
    model = own()
    want = model(inputs())
    lc.fuse(model)
    held = model.k_proj.lora_b["default"].detach().clone()
    model.k_proj.lora_b["default"].data.zero_()

    def gather(layer, _):
        layer.lora_b["default"].data.copy_(held)

    model.k_proj.register_forward_pre_hook(gather)
    assert (model(inputs()) - want).abs().max() <= APART * want.abs().max()


@pytest.mark.parametrize("name", MAKERS)
def test_siblings_follow_autocast(name):
    model = MAKERS[name]()
    lc.fuse(model)
    with torch.autocast("cpu", dtype=HALF):
        with Calls() as calls:
            fused = model(inputs())
        lc.unfuse(model)
        plain = model(inputs())
    assert calls.together == 1 and fused.dtype == plain.dtype
    assert (fused - plain).abs().max() <= 8 * torch.finfo(HALF).eps * plain.abs().max()


def test_siblings_compute_alone_when_one_of_them_cannot_take_part():
    def disabled(model):
        model.base_model.disable_adapter_layers()

    def trained_bias(model):
        model.get_base_model().k_proj.base_layer.bias.requires_grad_(True)

    def merged(model):
        model.get_base_model().v_proj.merge()

    def in_eval(model):
        model.get_base_model().v_proj.eval()

    def two_adapters(model):
        model.add_adapter("other", peft.LoraConfig(target_modules=["k_proj"], r=3))
        randomise(model)
        model.base_model.set_adapter(["default", "other"])

    def wide_pair(model):
        model.get_base_model().k_proj.lora_A["default"].double()
        model.get_base_model().k_proj.lora_B["default"].double()

    for change in (disabled, trained_bias, merged, in_eval, two_adapters, wide_pair):
        model = with_peft().train()
        change(model)
        want, grads = gradients(copy.deepcopy(model), inputs())
        lc.fuse(model)
        with Calls() as calls:
            y, fused = gradients(model, inputs())
        assert calls.together == 0, change.__name__
        assert (y - want).abs().max() <= APART * want.abs().max(), change.__name__
        for name, g in grads.items():
            assert (fused[name] - g).abs().max() <= APART * g.abs().max(), (change.__name__, name)


def test_hooks_on_a_sibling_still_run():
    model = own().eval()
    lc.fuse(model)
    want = model(inputs())
    seen = []
    model.k_proj.register_forward_hook(lambda module, given, out: seen.append(out.shape) or 2 * out)
    doubled = model(inputs())
    assert seen == [(ROWS, 40)] and not torch.equal(doubled, want)
    # a hook that hands the layer another tensor is obeyed
    model.v_proj.register_forward_pre_hook(lambda module, given: (given[0] + 1,))
    assert not torch.equal(model(inputs()), doubled)


@pytest.mark.parametrize("name", ["own", "peft", "peft 4-bit"])
def test_siblings_compile_to_one_graph(name):
    model = MAKERS[name]().eval()
    lc.fuse(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    want = model(inputs())
    assert (compiled(inputs()) - want).abs().max() <= APART * want.abs().max()


def test_copies_share_among_themselves_and_unfuse_ends_it():
    model = own().eval()
    lc.fuse(model)
    duplicate = copy.deepcopy(model)
    assert duplicate.q_proj.siblings is duplicate.v_proj.siblings is not model.q_proj.siblings
    assert duplicate.q_proj.siblings.members == [duplicate.q_proj, duplicate.k_proj, duplicate.v_proj]
    with Calls() as calls:
        y = duplicate(inputs())
    assert calls.together == 1 and torch.equal(y, model(inputs()))
    lc.unfuse(duplicate)
    with Calls() as calls:
        duplicate(inputs())
    assert calls.together == 0 and "siblings" not in duplicate.q_proj.__dict__
    assert [name for name, m in duplicate.named_modules() if isinstance(m, Fused)] == []
    lc.fuse(duplicate)
    assert lc.fuse(duplicate).shared == []


def test_transformers_attention_and_mlp_share_their_input():
    model = transformers_model()
    lc.add_adapter(model, lc.LoraConfig(r=4, target_modules="all-linear"))
    randomise(model, 0.1)
    tokens = torch.randint(TINY.vocabulary, (5, 13))
    want = model(input_ids=tokens).logits
    report = lc.fuse(model)
    assert len(report.shared) == 2 * TINY.layers
    assert {tuple(n.rpartition(".")[2] for n in group) for group in report.shared} == {
        ("q_proj", "k_proj", "v_proj"),
        ("gate_proj", "up_proj"),
    }
    assert f"{5 * TINY.layers} of them in {2 * TINY.layers} groups that read their input once" in str(report)
    with Calls() as calls:
        got = model(input_ids=tokens).logits
    assert (calls.together, calls.alone) == (2 * TINY.layers, 2 * TINY.layers)
    assert (got - want).abs().max() <= APART * want.abs().max()


def test_only_adapted_layers_are_grouped():
    model = with_peft(target_modules=["q_proj", "v_proj"])
    (group,) = lc.fuse(model).shared
    assert [name.rpartition(".")[2] for name in group] == ["q_proj", "v_proj"]
    alone = with_peft(target_modules=["k_proj"])
    assert lc.fuse(alone).shared == []
