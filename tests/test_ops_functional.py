"""The LoRA operations inside torch.func's transforms and forward mode, and differentiated again: as their formula is.

In float64, against the formula written with PyTorch's own operations, under the same transform.
"""

import pytest
import torch
from tolerance import assert_same_function
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacrev, jvp, vmap

import lora_core as lc
from lora_core.ops.grouped_lora import grouped_lora
from lora_core.ops.layer import Layer
from lora_core.ops.lora_linears import lora_linears
from lora_core.ops.nf4_dequantize import nf4_dequantize

M, N, K, R = 5, 6, 16, 3
SCALING = (0.5, -2.0)
ADAPTER = torch.tensor([0, 1, -1, 0, 1])


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def operands():
    """x, W, bias, A and B."""
    return draw(M, K), draw(N, K), draw(N), draw(R, K), draw(N, R)


def written(x, weight, bias, a, b):
    return x @ weight.T + bias + SCALING[0] * (x @ a.T) @ b.T


def two_written(x, weight, bias, a, b):
    """Two adapters, of ranks 1 and R - 1, for some of the rows each."""
    parts = ((a[:1], b[:, :1]), (a[1:], b[:, 1:]))
    updates = (
        (ADAPTER[: len(x)] == g)[:, None] * SCALING[g] * ((x @ a_g.T) @ b_g.T) for g, (a_g, b_g) in enumerate(parts)
    )
    return x @ weight.T + bias + sum(updates)


def linear(x, weight, bias, a, b):
    return lc.lora_linear(x, weight, bias, a, b, SCALING[0])


def several(x, weight, bias, a, b):
    return lora_linears(x, [Layer(weight, bias, a, b, SCALING[0]), Layer(weight, None, a, b, 3.0)])[0]


def mixed(x, weight, bias, a, b):
    scaling = torch.tensor(SCALING)
    return grouped_lora(x, a, b, [1, R - 1], ADAPTER[: len(x)], scaling, x @ weight.T + bias)


def four_bit(x, q, bias, a, b):
    return lc.nf4_lora_linear(x, q, bias, a, b, SCALING[0])


def square(f):
    """A sum of squares, whose second derivatives are not zero."""
    return lambda *args: f(*args).square().sum()


def by_row(f, x, *rest):
    return vmap(grad(square(f), (3, 4)), (0, *[None] * len(rest)))(x.unsqueeze(1), *rest)


def by_adapter(f, x, weight, bias, a, b):
    """The gradients of an ensemble of adapters, of which x is no part."""
    pairs = (torch.stack([a, 2 * a]), torch.stack([b, b - 1]))
    return vmap(grad(square(f), (3, 4)), (None, None, None, 0, 0))(x, weight, bias, *pairs)


def mapped(f, x, weight, bias, a, b):
    return vmap(f, (None, None, None, 0, None))(x, weight, bias, torch.stack([a, 2 * a]), b)


def tangent(f, x, weight, bias, a, b):
    """Of x, A and B at once."""
    return jvp(lambda x, a, b: f(x, weight, bias, a, b), (x, a, b), (x - 1, a + 1, 2 * b))[1]


def dual(f, x, weight, bias, a, b):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(x, weight, bias, forward_ad.make_dual(a, a + 1), b)).tangent


def again(f, x, weight, bias, a, b):
    """Gradients of a penalty on gradients."""
    x, a, b = (t.clone().requires_grad_() for t in (x, a, b))
    first = torch.autograd.grad(f(x, weight, bias, a, b).square().sum(), (x, a, b), create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), (x, a, b))


TRANSFORMS = {
    "grad": lambda f, *args: grad(square(f), (0, 3, 4))(*args),
    "second": lambda f, *args: grad(square(grad(square(f), 3)), 4)(*args),
    "jacrev": lambda f, *args: jacrev(f, 3)(*args),
    "hessian": lambda f, x, w, bias, a, b: hessian(lambda b: f(x, w, bias, a, b).square().sum())(b),
    "by row": by_row,
    "by adapter": by_adapter,
    "vmap": mapped,
    "jvp": tangent,
    "dual": dual,
    "again": again,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("run", [linear, several, mixed, four_bit], ids=lambda run: run.__name__)
def test_transform_of_an_operation_is_that_of_its_formula(run, transform):
    x, weight, bias, a, b = operands()
    ours = run
    if run is four_bit:
        # no argument of a transform: a module
        q = lc.quantize_nf4(weight.float())
        weight, ours = q.dequantize(torch.float64), lambda x, _, *rest: four_bit(x, q, *rest)
    got = TRANSFORMS[transform](ours, x, weight, bias, a, b)
    want = TRANSFORMS[transform](two_written if run is mixed else written, x, weight, bias, a, b)
    pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
    for one, other in pairs:
        assert other.norm() > 0
        assert_same_function(one, other)


def one(x, weight, bias, a, b, *mask):
    return lc.lora_linear(x, weight, bias, a, b, SCALING[0], *mask)


def one_of_four_bits(x, weight, bias, a, b, *mask):
    return lc.nf4_lora_linear(x, lc.quantize_nf4(weight.float()), bias, a, b, SCALING[0], *mask)


def both(x, weight, bias, a, b, *mask):
    layers = [Layer(weight, bias, a, b, SCALING[0], *mask), Layer(weight, None, a, 2 * b, 1.5)]
    return torch.cat(lora_linears(x, layers), -1)


@pytest.mark.parametrize("trained", ["x", "a", "b", "ab", "xa", "xab"])
@pytest.mark.parametrize(
    ("run", "mask"),
    [(run, mask) for run in (one, one_of_four_bits, both) for mask in ((), (0.3, torch.tensor([7])))] + [(mixed, ())],
    ids=lambda part: getattr(part, "__name__", "masked" if part else "whole"),
)
def test_second_derivatives_are_those_of_differences(run, mask, trained):
    """Of any part of the operands, under a fixed mask too; in batches, as jacobian(vectorize=True) takes them."""
    x, weight, bias, a, b = operands()
    given = {"x": x[:3], "a": a, "b": b}
    leaves = [given[name].requires_grad_() for name in trained]

    def function(*values):
        now = given | dict(zip(trained, values, strict=True))
        return run(now["x"], weight, bias, now["a"], now["b"], *mask)

    assert torch.autograd.gradgradcheck(function, leaves, check_batched_grad=True)


@pytest.mark.parametrize("run", [one, one_of_four_bits, mixed], ids=lambda run: run.__name__)
def test_second_derivative_that_takes_an_x_that_is_not_kept_is_refused(run):
    """Where A is frozen x is not kept: the memory that saves is what A is frozen for."""
    x, weight, bias, a, b = operands()
    x.requires_grad_(), b.requires_grad_()
    y = run(x, weight, bias, a, b).sum()
    torch.autograd.grad(y, (x, b), retain_graph=True)
    with pytest.raises(lc.ConfigError, match="takes x, which is not kept where A is frozen"):
        torch.autograd.grad(y, (x, b), create_graph=True)


def test_a_compiled_tangent_is_that_of_the_formula():
    """A compiler goes past what refuses: it would take the result for a constant."""
    x, weight, bias, a, b = operands()

    def of(f):
        return lambda x: jvp(lambda x: f(x, weight, bias, a, b), (x,), (x,))[1]

    assert_same_function(torch.compile(of(linear), backend="aot_eager", fullgraph=True)(x), of(written)(x))


def test_a_tangent_of_scales_is_refused():
    """Decoding is no function that is differentiated; a result without tangent would pass for a constant."""
    q = lc.quantize_nf4(draw(N, 64).float(), 64, False)
    with pytest.raises(lc.ConfigError, match="nf4_dequantize has no forward-mode derivative"):
        jvp(lambda s: nf4_dequantize(q.codes, s, None, None, q.shape, torch.float32, 64), (q.absmax,), (q.absmax,))


def test_mixed_batches_of_one_row_and_of_mapped_adapters_are_taken():
    x, _, _, a, b = operands()
    scaling = torch.tensor(SCALING)

    def one(row, g):
        return grouped_lora(row, a, b, [1, R - 1], g, scaling)

    want = grouped_lora(x, a, b, [1, R - 1], ADAPTER, scaling)
    assert_same_function(vmap(one)(x, ADAPTER), want)
    got = torch.stack([grad(lambda row, g=g: one(row, g).sum())(row) for row, g in zip(x, ADAPTER, strict=True)])
    (wanted,) = torch.autograd.grad(grouped_lora(x.requires_grad_(), a, b, [1, R - 1], ADAPTER, scaling).sum(), x)
    assert_same_function(got, wanted)


@pytest.mark.parametrize("what", ["weight", "bias", "scaling"])
def test_a_tangent_of_what_is_frozen_elsewhere_is_carried(what):
    x, weight, bias, a, b = operands()
    if what == "scaling":
        scaling = torch.tensor(SCALING, dtype=torch.float32)
        one = jvp(lambda s: grouped_lora(x, a, b, [1, R - 1], ADAPTER, s), (scaling,), (scaling,))
        # linear in the scaling
        assert_same_function(one[1], one[0])
        return
    moved = {"weight": weight, "bias": bias}[what]

    def of(f):
        return lambda t: f(x, t if what == "weight" else weight, t if what == "bias" else bias, a, b)

    assert_same_function(*(jvp(of(f), (moved,), (moved + 1,))[1] for f in (linear, written)))


def test_per_sample_gradients_of_a_model_are_those_one_by_one():
    """As differentially private training takes them: adapted layers, dense and in 4 bits."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 8))
    lc.quantize_model(model, skip_modules=["2"])
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.double()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    x = draw(4, 64)

    def loss(parameters, row):
        return torch.func.functional_call(model, parameters, (row.unsqueeze(0),)).square().sum()

    got = vmap(grad(loss), (None, 0))({n: p.detach() for n, p in trained.items()}, x)
    for i, row in enumerate(x):
        wanted = torch.autograd.grad(model(row.unsqueeze(0)).square().sum(), list(trained.values()))
        for name, want in zip(trained, wanted, strict=True):
            assert_same_function(got[name][i], want)
