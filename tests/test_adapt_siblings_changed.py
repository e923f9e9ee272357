"""What changes between the calls of layers that share their input: every layer answers as it would alone."""

import copy

import peft
import pytest
import torch
from models import randomise
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_core as lc
from lora_core.layers.fused import Fused

pytestmark = [
    pytest.mark.peer("peft"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*"),
]

WIDTH, ROWS = 16, 80
NAMES = ["a", "b", "c"]
# layers of this size, cut in another way, round apart by a few units of the largest result
APART = 64 * torch.finfo(torch.float32).eps


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in NAMES)

    def forward(self, x):
        return self.a(x), self.b(x), self.c(x)


def own(**config):
    model = lc.add_adapter(Three(), lc.LoraConfig(r=2, target_modules=NAMES, **config))
    randomise(model)
    return model


def with_peft(**config):
    model = peft.get_peft_model(Three(), peft.LoraConfig(r=2, target_modules=NAMES, **config)).get_base_model()
    randomise(model)
    return model


MAKERS = {"own": own, "peft": with_peft}
made_by = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def both(make, **config):
    """The model as it is, and fused."""
    plain = make(**config)
    fused = copy.deepcopy(plain)
    (group,) = lc.fuse(fused).shared
    assert list(group) == NAMES
    return plain, fused


def inputs():
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


def up(layer):
    """B of a layer, whoever made it."""
    return layer.lora_b["default"] if hasattr(layer, "lora_b") else layer.lora_B["default"].weight


def weight_in_place(layer):
    with torch.no_grad():
        layer.base_layer.weight.mul_(0.5)


def weight_replaced(layer):
    layer.base_layer.weight = nn.Parameter(0.5 * layer.base_layer.weight.detach(), requires_grad=False)


def bias_replaced(layer):
    layer.base_layer.bias = nn.Parameter(torch.ones(WIDTH), requires_grad=False)


def other_memory(layer):
    up(layer).data = 2 * up(layer).data


def hook_on_base(layer):
    layer.base_layer.register_forward_hook(lambda module, given, y: 0 * y)


@made_by
@pytest.mark.parametrize(
    "change", [weight_in_place, weight_replaced, bias_replaced, other_memory, hook_on_base], ids=lambda f: f.__name__
)
def test_a_change_before_a_layer_is_called_is_met(make, change):
    x = inputs()
    results = []
    for model in both(make):
        with torch.no_grad():
            model.a(x)
            before = copy.deepcopy(model.b)(x)
            change(model.b)
            results.append(model.b(x))
    plain, fused = results
    assert (before - plain).abs().max() > 0.1
    assert (fused - plain).abs().max() <= APART * plain.abs().max()


@made_by
@pytest.mark.parametrize("trained", [False, True])
def test_a_layer_trains_if_it_does_when_it_is_called(make, trained):
    x = inputs()
    for model in both(make):
        pair = [p for p in model.b.parameters() if p.requires_grad]
        for p in pair:
            p.requires_grad_(not trained)
        model.a(x)
        for p in pair:
            p.requires_grad_(trained)
        assert model.b(x).requires_grad == trained


class Checkpointed(nn.Module):
    def __init__(self, layer, reentrant):
        super().__init__()
        self.layer, self.reentrant = layer, reentrant

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=self.reentrant)


@made_by
@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_are_checkpointed_one_by_one_meet_their_masks_again(make, reentrant):
    """y is linear in B, so <dL/dB, B> is what the low-rank path adds to a linear loss: with another mask it is not."""
    _, model = both(make, lora_dropout=0.5)
    model.train()
    layers = {name: getattr(model, name) for name in NAMES}
    for name, layer in layers.items():
        setattr(model, name, Checkpointed(layer, reentrant))
    x = inputs().requires_grad_()
    torch.manual_seed(3)
    ys = model(x)
    torch.autograd.backward([y.sum() for y in ys])
    for y, layer in zip(ys, layers.values(), strict=True):
        frozen = layer.base_layer(x).sum()
        adapted = (y.sum() - frozen).item()
        assert abs((up(layer).grad * up(layer)).sum().item() - adapted) <= APART * ROWS * WIDTH


@made_by
def test_autocast_leaves_float64_alone_in_layers_together(make):
    _, model = both(make)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {y.dtype for y in model.double()(inputs().double())} == {torch.float64}


@made_by
def test_a_copy_of_a_layer_answers_for_itself(make):
    """torch.nn.DataParallel calls such copies."""
    plain, model = both(make)
    x = inputs()
    for duplicate in (copy.copy(model.b), model.b._replicate_for_data_parallel()):
        want = plain.b(x)
        assert (duplicate(x) - want).abs().max() <= APART * want.abs().max()


class Gated(torch.autograd.Function):
    """silu(a) b, whose gradients lie over a and b, as Liger Kernel's do to save memory."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return nn.functional.silu(a) * b

    @staticmethod
    def backward(ctx, d_y):
        a, b = ctx.saved_tensors
        gate = a.sigmoid()
        d_a, d_b = d_y * b * gate * (1 + a * (1 - gate)), d_y * a * gate
        a.data.copy_(d_a), b.data.copy_(d_b)
        return a, b


@made_by
def test_a_backward_may_write_its_gradients_over_the_outputs(make):
    grads = []
    for model, gated in zip(both(make), (lambda a, b: nn.functional.silu(a) * b, Gated.apply), strict=True):
        x = inputs().requires_grad_()
        a, b, c = model(x)
        trained = [p for p in model.parameters() if p.requires_grad]
        grads.append(torch.autograd.grad((gated(a, b) * c).square().sum(), [x, *trained]))
    assert all((g - w).abs().max() <= APART * w.abs().max() for w, g in zip(*grads, strict=True))


@made_by
def test_layers_apart_can_go_backward_one_after_the_other(make):
    plain = make()
    fused = copy.deepcopy(plain)
    report = lc.fuse(fused, share=False)
    assert report.shared == [] and len(report.swapped) == 3
    for y in fused(inputs()):
        y.sum().backward()
    with pytest.raises(RuntimeError, match="share=False"):
        for y in both(make)[1](inputs()):
            y.sum().backward()


@made_by
def test_unfuse_of_one_layer_leaves_the_others_fused_and_alone(make):
    plain, model = both(make)
    lc.unfuse(model.b)
    want, got = plain(inputs()), model(inputs())
    assert all((y - w).abs().max() <= APART * w.abs().max() for y, w in zip(got, want, strict=True))
    assert not isinstance(model.b, Fused) and isinstance(model.a, Fused)
    assert not any(vars(getattr(model, name)).get("siblings") for name in NAMES)
    (group,) = lc.fuse(model).shared
    assert list(group) == NAMES


@made_by
def test_what_was_bound_while_a_layer_was_fused_runs_its_own_forward_after_unfuse(make):
    """As accelerate's hooks bind it."""
    plain, model = both(make)
    bound = model.a.forward
    lc.unfuse(model)
    model.a.forward = lambda x: 2 * bound(x)
    assert torch.equal(model.a(inputs()), 2 * plain.a(inputs()))


@made_by
def test_a_forward_that_hooks_have_left_behind_is_no_patch(make):
    model = make()
    for module in model.modules():
        module.forward = module.forward
    report = lc.fuse(model)
    assert len(report.swapped) == 3 and len(report.shared) == 1
    with torch.profiler.profile() as profile:
        model(inputs())
    assert "LoraLinears" in {event.key for event in profile.key_averages()}


@made_by
def test_a_layer_with_a_backward_hook_computes_once(make):
    """PyTorch hands it a tensor of its own: what is computed for the others would be kept."""
    _, model = both(make)
    model.b.register_full_backward_hook(lambda *given: None)
    x = inputs().requires_grad_()
    torch.autograd.backward([y.sum() for y in model(x)])
    assert model.a.siblings._held is None


def test_one_layer_under_two_names_shares_with_no_other():
    model = Three()
    model.b = model.a
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["a", "c"]))
    assert lc.fuse(model).shared == []


def test_global_hooks_meet_the_layers_inside():
    plain, model = both(with_peft)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, given, y: seen.append(type(module)))
    try:
        found = []
        for either in (plain, model):
            seen.clear()
            either(inputs())
            found.append(seen.count(nn.Linear))
    finally:
        handle.remove()
    assert found[0] == found[1] == 9


@pytest.mark.parametrize(
    ("change", "why"),
    [({"lora_dropout": 1.0}, "drops everything"), ({"lora_alpha": float("inf")}, "has the scaling inf")],
    ids=str,
)
def test_an_adapter_that_no_operation_takes_runs_as_it_is(change, why):
    model = with_peft(**change)
    plain = copy.deepcopy(model)
    report = lc.fuse(model)
    assert report.swapped == [] and why in str(report)
    assert all(torch.equal(y, w) for y, w in zip(model(inputs()), plain(inputs()), strict=True))


def test_layers_whose_matrices_are_of_different_dtypes_are_each_on_their_own():
    plain, fused = both(own)
    for model in (plain, fused):
        model.bfloat16()
        for matrices in (model.b.lora_a, model.b.lora_b):
            matrices.float()
    x = torch.randn(ROWS, WIDTH).bfloat16()
    assert all(map(torch.equal, fused(x), plain(x)))


def test_what_a_dormant_start_took_out_of_the_weights_is_added_back_by_siblings():
    plain = own(init_lora_weights="pissa")
    lc.add_adapter(plain, lc.LoraConfig(r=2, target_modules=NAMES), "other")
    fused = copy.deepcopy(plain)
    lc.fuse(fused)
    for y, want in zip(fused(inputs()), plain(inputs()), strict=True):
        assert (y - want).abs().max() <= APART * want.abs().max()


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_layers_whose_biases_are_trained_are_each_on_their_own(bias):
    plain = own(bias=bias)
    fused = copy.deepcopy(plain)
    lc.fuse(fused)
    for model in (plain, fused):
        sum(y.sum() for y in model(inputs())).backward()
    for name in NAMES:
        one, other = (getattr(model, name).bias.grad for model in (plain, fused))
        assert one is not None and torch.equal(one, other)
