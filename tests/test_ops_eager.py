"""Past the dispatcher or through it: the same bits, and whoever listens to the dispatcher hears every operation."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lora_core as lc
from lora_core.ops import eager
from lora_core.ops.layer import Layer
from lora_core.ops.lora_linears import lora_linears
from lora_core.ops.nf4_lora_linear import packed_lora_linear
from lora_core.ops.packed import Packed

OPS = ("linear", "nf4", "linears")
NAMES = {"linear": "lora_linear", "nf4": "nf4_lora_linear", "linears": "lora_linears"}


class Listener(TorchDispatchMode):
    """Keeps the names of the operations that come by."""

    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.heard.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def operands():
    g = torch.Generator().manual_seed(0)
    x, weight, lora_a, lora_b = (torch.randn(*s, generator=g) for s in ((5, 64), (40, 64), (3, 64), (40, 3)))
    return weight, *(t.requires_grad_() for t in (x, lora_a, lora_b))


def run(which, weight, x, lora_a, lora_b, change=lambda y: y):
    seed = torch.tensor([3])
    if which == "linear":
        return change(lc.lora_linear(x, weight, None, lora_a, lora_b, 0.5, 0.3, seed))
    q = lc.quantize_nf4(weight)
    if which == "nf4":
        return change(lc.nf4_lora_linear(x, q, None, lora_a, lora_b, 0.5, 0.3, seed))
    layers = [Layer(w, None, lora_a, lora_b, 0.5, 0.3, seed) for w in (weight, Packed.of(q))]
    return torch.cat([change(y) for y in lora_linears(x, layers)], 1)


@pytest.mark.parametrize("which", OPS)
def test_both_ways_give_the_same_bits(which):
    weight, *leaves = operands()
    found = []
    for listening in (contextlib.nullcontext(), Listener()):
        with listening:
            y = run(which, weight, *leaves)
        found.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("which", OPS)
@pytest.mark.parametrize("listening", [contextlib.nullcontext, Listener], ids=["past", "through"])
def test_a_result_may_be_changed_in_place(which, listening):
    """As that of torch.nn.functional.linear may: an activation does so, a residual is added so."""
    weight, *leaves = operands()
    found = []
    for change in (lambda y: y.add(0.5).relu(), lambda y: y.add_(0.5).relu_()):
        with listening():
            y = run(which, weight, *leaves, change)
        found.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("which", OPS)
@pytest.mark.parametrize("grad", [True, False])
def test_a_dispatch_mode_hears_the_operation(which, grad):
    with torch.set_grad_enabled(grad), Listener() as listener:
        run(which, *operands())
    assert f"lora_core::{NAMES[which]}" in listener.heard


@pytest.mark.parametrize("which", OPS)
@pytest.mark.parametrize("grad", [True, False])
def test_the_operation_is_passed_by_while_nobody_listens(which, grad):
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.set_grad_enabled(grad), torch.profiler.profile(activities=activities) as seen:
        y = run(which, *operands())
        if grad:
            y.sum().backward()
    names = {f"lora_core::{name}{end}" for name in NAMES.values() for end in ("", "_backward")}
    assert not names & {event.key for event in seen.key_averages()}


def test_a_list_of_sizes_is_no_list_of_tensors():
    weight, x, lora_a, lora_b = operands()
    w = Packed.of(lc.quantize_nf4(weight))
    ways = [packed_lora_linear(x, w._replace(shape=kind(w.shape)), None, lora_a, lora_b, 0.5) for kind in (tuple, list)]
    grads = [torch.autograd.grad(y.square().sum(), (x, lora_a, lora_b)) for y in ways]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_derivative_goes_by_the_operations_name():
    weight, *leaves = operands()
    assert type(run("linear", weight, *leaves).grad_fn).__name__ == "LoraLinearBackward"


@pytest.mark.parametrize("which", OPS)
def test_a_gradient_that_is_to_be_differentiated_is_made_by_the_reference(which, monkeypatch):
    """What runs an operation on a device may have no derivative: loops, kernels, changes in place."""

    def refuse(*_):
        raise AssertionError("no reference")

    for operation, device in list(eager._implementations):
        if operation._opoverload._opname.endswith("_backward"):
            monkeypatch.setitem(eager._implementations, (operation, device), refuse)
    weight, x, lora_a, lora_b = operands()
    loss = run(which, weight, x, lora_a, lora_b).square().sum()
    with pytest.raises(AssertionError, match="no reference"):
        torch.autograd.grad(loss, x, retain_graph=True)
    (d_x,) = torch.autograd.grad(loss, x, create_graph=True)
    (d_a,) = torch.autograd.grad(d_x.sum(), lora_a, create_graph=True)
    assert d_a.norm() > 0


def test_an_operation_whose_implementation_is_taken_back_runs_its_own_body_again(monkeypatch):
    """By the dispatcher, too, which keeps what it was given."""
    monkeypatch.setattr(eager, "_definitions", dict(eager._definitions))

    @torch.library.custom_op("lora_core_tests::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    x, name = torch.tensor([1.0, 5.0]), "lora_core_tests::twice"
    ways = (torch.ops.lora_core_tests.twice, twice, lambda x: eager.call(twice, x))
    eager.register(twice, "cpu", lambda x: 3 * x)
    assert eager.registered(name, "cpu") and all(torch.equal(way(x), 3 * x) for way in ways)
    eager.unregister(twice, "cpu")
    assert eager.registered(name, "cpu") is None and all(torch.equal(way(x), 2 * x) for way in ways)


def test_a_quantised_weight_is_decoded_past_the_dispatcher():
    q = lc.quantize_nf4(torch.randn(8, 64))
    with torch.profiler.profile() as profile:
        q.dequantize()
    assert not any(event.key.startswith("lora_core::") for event in profile.key_averages())
    with Listener() as listener:
        q.dequantize()
    assert listener.heard == ["lora_core::nf4_dequantize"]


def test_tensors_that_dispatch_by_themselves_go_through():
    from torch._subclasses import FakeTensorMode

    weight, x, lora_a, lora_b = (t.detach() for t in operands())
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (x, weight, lora_a, lora_b)]
    # outside the mode the tensors themselves say that they are none of the plain ones
    assert eager._direct_implementation(None, (fake[0],)) is None
    y = lc.lora_linear(fake[0], fake[1], None, fake[2], fake[3], 0.5)
    assert y.shape == (5, 40) and isinstance(y, type(fake[0]))


@pytest.mark.parametrize("args", [(1, [torch.ones(1), torch.ones(2)], None, []), ([torch.ones(1)],), (3.0,)], ids=str)
def test_arguments_come_back_from_their_flat_form(args):
    layout = [len(a) if eager._is_list(a) else -1 for a in args]
    flat = list(eager._flat(args, layout))
    assert not any(eager._is_list(a) for a in flat)
    assert list(eager._nested(flat, layout)) == list(args)
    assert list(eager._flat([None] * len(args), layout)) == [None] * len(flat)
