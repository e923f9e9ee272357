"""The LoRA operations inside PyTorch's modes: autocast around the backward, forward mode, vmap, export; and what a
backward makes and keeps, which its results do not show."""

import fractions
import gc
import weakref

import numpy as np
import pytest
import torch
from lora_bounds import check_backward
from torch import nn

import lora_core as lc
from lora_core.cpu import compiled
from lora_core.ops import packed
from lora_core.ops.grouped_lora import grouped_lora
from lora_core.ops.grouped_lora import op as grouped_op
from lora_core.ops.layer import Layer
from lora_core.ops.lora_linear import lora_linear
from lora_core.ops.lora_linear import op as linear_op
from lora_core.ops.lora_linears import lora_linears
from lora_core.ops.nf4_lora_linear import backward_op as nf4_backward_op
from lora_core.ops.nf4_lora_linear import nf4_lora_linear
from lora_core.ops.nf4_lora_linear import op as nf4_op
from lora_core.ops.packed import Packed

SEED = torch.tensor([5])


def operands(m=6, n=40, k=64, r=3, dtype=torch.float32):
    def draw(*shape):
        return torch.randn(*shape, dtype=dtype)

    return draw(m, k).requires_grad_(), draw(n, k), draw(n), draw(r, k).requires_grad_(), draw(n, r).requires_grad_()


def run(which, x, weight, bias, a, b, scaling=0.5):
    if which == "nf4":
        return nf4_lora_linear(x, lc.quantize_nf4(weight), bias, a, b, scaling)
    if which == "grouped":
        rows = torch.zeros(len(x), dtype=torch.int64)
        return grouped_lora(x, a, b, [len(a)], rows, torch.tensor([float(scaling)]), bias.expand(len(x), -1))
    if which == "linears":
        return lora_linears(x, [Layer(weight, bias, a, b, scaling)])[0]
    return lora_linear(x, weight, bias, a, b, scaling)


OPS = pytest.mark.parametrize("which", ["linear", "nf4", "linears"])


ADAPTED = pytest.mark.parametrize("which", ["linear", "nf4", "linears", "grouped"])


@ADAPTED
def test_backward_inside_autocast_is_that_outside(which):
    x, weight, bias, a, b = operands()
    wanted = torch.autograd.grad(run(which, x, weight, bias, a, b).sum(), (x, a, b))
    y = run(which, x, weight, bias, a, b)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(y.sum(), (x, a, b))
    assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


@ADAPTED
def test_autocast_leaves_float64_alone(which):
    """As it leaves torch.nn.functional.linear: also the products with A and B in float32 are those outside."""
    x, weight, bias, a, b = operands(dtype=torch.float64)
    weight = weight.float() if which == "nf4" else weight
    a, b = (t.detach().float().requires_grad_() for t in (a, b))
    found = []
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = run(which, x, weight, bias, a, b)
        found.append((y, *torch.autograd.grad(y.square().sum(), (x, a, b))))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@OPS
def test_autocast_takes_floating_x_alone(which):
    _, weight, bias, a, b = operands()
    for x in (torch.ones(2, 64, dtype=torch.int64), torch.ones(2, 64, dtype=torch.complex64)):
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(lc.DtypeError, match=str(x.dtype)):
            run(which, x, weight, bias, a, b)


def test_frozen_weight_may_change_before_the_backward_of_a_frozen_x():
    x, weight, bias, a, b = operands()
    y = lora_linear(x.detach(), weight, bias, a, b, 0.5)
    wanted = torch.autograd.grad(y.sum(), (a, b), retain_graph=True)
    weight.add_(1)
    assert all(torch.equal(g, w) for g, w in zip(torch.autograd.grad(y.sum(), (a, b)), wanted, strict=True))


@ADAPTED
def test_gradients_may_come_in_a_batch(which):
    """As jacobian(vectorize=True) asks for them."""
    x, weight, bias, a, b = operands(m=2, n=96, k=64)
    # of so many elements that few rows are multiplied by loops
    weight, bias, b = (torch.cat([t] * 16) for t in (weight, bias, b))
    y = run(which, x, weight, bias, a, b)
    batch = torch.randn(3, *y.shape)
    got = torch.autograd.grad(y, (x, a), batch, is_grads_batched=True)
    if which == "nf4":
        weight = lc.quantize_nf4(weight).dequantize()
    elif which == "grouped":
        weight = torch.zeros_like(weight)
    for d_x, d_a, d_y in zip(*got, batch, strict=True):
        check_backward((d_x, None, None, d_a, None), d_y, x, weight, a, b, x @ a.T, 0.5)


def test_the_hidden_state_is_no_output_to_differentiate():
    """It is there for the backward; no layer asks for a gradient of it."""
    x, weight, bias, a, b = operands()
    q = Packed.of(lc.quantize_nf4(weight))
    of_rows = torch.zeros(len(x), dtype=torch.int64)
    for y, hidden in (
        linear_op(x, weight, bias, a, b, 0.5, 0.0, None),
        nf4_op(x, *q, bias, a, b, 0.5, 0.0, None),
        grouped_op(x, None, a, b, [len(a)], of_rows, torch.ones(1)),
    ):
        assert y.requires_grad and not hidden.requires_grad


class NoGradient(torch.autograd.Function):
    """Passes values on and no gradient, not even zeros."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, d_y):
        return None


@ADAPTED
def test_an_output_that_no_gradient_reaches_leaves_none(which):
    x, weight, bias, a, b = operands()
    y = run(which, x, weight, bias, a, b)
    (NoGradient.apply(y) + x.sum()).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, y.numel())) and a.grad is None and b.grad is None


@pytest.mark.parametrize("strict", [False, True])
def test_adapted_quantised_model_can_be_exported(strict):
    model = lc.quantize_model(nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 8)), skip_modules=[])
    lc.add_adapter(model, lc.LoraConfig(r=3, target_modules="all-linear"))
    model.eval()
    x = torch.randn(4, 64)
    program = torch.export.export(model, (x,), strict=strict)
    assert torch.equal(program.module()(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_nf4_operations_pass_opcheck(dtype, dropout):
    x, weight, bias, a, b = operands(dtype=dtype)
    q = Packed.of(lc.quantize_nf4(weight.float()))
    seed = SEED if dropout else None
    torch.library.opcheck(nf4_op, (x, *q, bias.requires_grad_(), a, b, 0.5, dropout, seed))
    hidden, d_y = torch.randn(6, 3, dtype=dtype), torch.randn(6, 40, dtype=dtype)
    x, a, b = (t.detach() for t in (x, a, b))
    for needs in ([True] * 4, [True, False, False, False], [False, True, True, True], [False] * 4):
        given = (d_y, x, *q, a, b, hidden, 0.5, dropout, seed, needs)
        torch.library.opcheck(nf4_backward_op, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("m", [2, 200])
def test_no_dense_weight_outlives_a_forward_or_a_backward(m, monkeypatch):
    """Wherever it might be kept: on the graph, in a cache, on the layer."""
    made = []
    dequantize = packed.dequantize

    def watched(*args):
        w = dequantize(*args)
        made.append(weakref.ref(w.untyped_storage()))
        return w

    monkeypatch.setattr(packed, "dequantize", watched)
    x, weight, bias, a, b = operands(m, 300, 256)
    y = run("nf4", x, weight, bias, a, b)
    gc.collect()
    assert not any(ref() for ref in made)
    y.sum().backward()
    gc.collect()
    assert not any(ref() for ref in made)
    # where loops are compiled, few rows make none at all
    assert bool(made) is (m == 200 or compiled.load("nf4_product") is None)


PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::linear", "mkldnn::_linear_pointwise")


@OPS
def test_backward_of_a_frozen_weight_forms_no_gradient_of_it(which):
    """No product of the backward has the weight's shape: the profiler sees those inside an operation too."""
    m, n, k = 200, 300, 256
    x, weight, bias, a, b = operands(m, n, k)
    y = run(which, x, weight, bias, a, b)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as seen:
        y.sum().backward()
    shapes = [event.input_shapes for event in seen.events() if event.name in PRODUCTS]
    assert shapes, "the profiler saw no product at all"
    # dY^T [N, M] by x [M, K], in whichever order and transposition
    gradients = [s for s in shapes if {(n, m), (m, n)} & _matrices(s) and {(m, k), (k, m)} & _matrices(s)]
    forward = [s for s in gradients if {(n, k), (k, n)} & _matrices(s)]
    assert gradients == forward, "a product of dY and x that does not go through W"


def _matrices(shapes):
    return {tuple(shape) for shape in shapes if len(shape) == 2}


@OPS
def test_float64_with_float32_matrices_keeps_float64(which):
    x, weight, bias, a, b = (t.detach() for t in operands(dtype=torch.float64))
    given, x = weight.float() if which == "nf4" else weight, x.requires_grad_()
    dense = lc.quantize_nf4(given).dequantize(torch.float64) if which == "nf4" else weight
    y, wanted = run(which, x, given, bias, a.float(), 0 * b.float()), nn.functional.linear(x, dense, bias)
    (got,), (right,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(wanted.sum(), x)
    # both sum 64 products of float64 in an order of their own; a float32 anywhere is 1e8 times as far off
    for one, other in ((y, wanted), (got, right)):
        assert (one - other).norm() <= 64 * torch.finfo(torch.float64).eps * other.norm()


@OPS
@pytest.mark.parametrize(("n", "k"), [(0, 4), (4, 0)])
def test_weight_without_a_side_is_refused(which, n, k):
    with pytest.raises(lc.ShapeError, match="a side of 0"):
        run(which, torch.randn(3, k), torch.randn(n, k), None, torch.randn(2, k), torch.randn(n, 2))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"bias": 1.0}, lc.DtypeError, "bias is a float; want a torch.Tensor or None"),
        ({"scaling": float("nan")}, lc.ConfigError, "scaling is nan; want a finite number"),
        ({"scaling": 10**400}, lc.ConfigError, "want a finite number"),
        ({"dropout": "0.5"}, lc.ConfigError, "dropout is '0.5'"),
        ({"dropout": 0.5, "seed": 5}, lc.ConfigError, "got 5"),
        ({"seed": "junk"}, lc.ConfigError, "got 'junk'"),
        ({"dropout": 0.5, "seed": torch.tensor([1], device="meta")}, lc.DeviceError, "seed on meta"),
    ],
)
@pytest.mark.parametrize("quantised", [False, True])
def test_operands_of_another_kind_are_refused(changes, error, message, quantised):
    x, weight, bias, a, b = operands()
    given = {"bias": bias, "lora_a": a, "lora_b": b, "scaling": 0.5} | changes
    with pytest.raises(error, match=message):
        nf4_lora_linear(x, lc.quantize_nf4(weight), **given) if quantised else lora_linear(x, weight, **given)


@OPS
def test_seed_is_not_asked_for_its_device_without_dropout(which):
    x, weight, bias, a, b = operands()
    wanted = run(which, x, weight, bias, a, b)
    seed = torch.tensor([1], device="meta")
    if which == "linears":
        (y,) = lora_linears(x, [Layer(weight, bias, a, b, 0.5, 0.0, seed)])
    elif which == "nf4":
        y = nf4_lora_linear(x, lc.quantize_nf4(weight), bias, a, b, 0.5, 0.0, seed)
    else:
        y = lora_linear(x, weight, bias, a, b, 0.5, 0.0, seed)
    assert torch.equal(y, wanted)
    grads = [torch.autograd.grad(result.sum(), (x, a, b)) for result in (y, wanted)]
    assert all(torch.equal(got, want) for got, want in zip(*grads, strict=True))


@pytest.mark.parametrize("kind", [np.float32, fractions.Fraction])
def test_scaling_and_dropout_may_be_other_numbers(kind):
    x, weight, bias, a, b = operands()
    half = kind(0.5)
    wanted = lora_linear(x, weight, bias, a, b, 0.5, 0.5, SEED)
    assert torch.equal(lora_linear(x, weight, bias, a, b, half, half, SEED), wanted)
    q = lc.quantize_nf4(weight)
    wanted = nf4_lora_linear(x, q, bias, a, b, 0.5, 0.5, SEED)
    assert torch.equal(nf4_lora_linear(x, q, bias, a, b, half, half, SEED), wanted)
    (got,), (wanted,) = (lora_linears(x, [Layer(weight, bias, a, b, s, s, SEED)]) for s in (half, 0.5))
    assert torch.equal(got, wanted)


def test_weight_of_other_dimensions_is_refused():
    with pytest.raises(lc.ShapeError, match=r"weight \(\).*: weight has 0 dimensions, want 2"):
        nf4_lora_linear(torch.randn(2, 3), lc.quantize_nf4(torch.tensor(3.0)), None, None, None, 0.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda layer: tuple(layer), lc.ConfigError, "layer 0 is a tuple; want"),
        (lambda layer: layer._replace(lora_a=None), lc.DtypeError, "lora_a is a NoneType"),
        (lambda layer: layer._replace(scaling="1"), lc.ConfigError, "scaling is '1'"),
        (
            lambda layer: layer._replace(weight=lc.quantize_nf4(layer.weight)),
            lc.DtypeError,
            "weight is a QuantizedWeight; want a torch.Tensor, or Packed.of",
        ),
    ],
)
def test_layers_of_another_kind_are_refused(change, error, message):
    x, weight, bias, a, b = operands()
    with pytest.raises(error, match=message):
        lora_linears(x, [change(Layer(weight, bias, a, b, 0.5))])
