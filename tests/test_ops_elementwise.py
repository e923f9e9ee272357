"""rms_norm, swiglu and rotary: their gradients, what they refuse, and how they go with the rest of PyTorch."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from lora_core.errors import ConfigError, DeviceError, DtypeError, ShapeError
from lora_core.ops.rms_norm import rms_norm
from lora_core.ops.rotary import rotary
from lora_core.ops.swiglu import swiglu

OPS = torch.ops.lora_core
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def drawn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def operands(dtype=torch.float64):
    """Of each operation, all in memory that is not simply contiguous; x, gate, up and weight take a gradient."""
    x = drawn(3, 2, 8, dtype=dtype).transpose(0, 1).requires_grad_()
    weight = drawn(16, dtype=dtype, seed=1)[::2].requires_grad_()
    up = drawn(2, 8, 3, dtype=dtype, seed=2).transpose(1, 2).requires_grad_()
    heads = drawn(2, 5, 3, 8, dtype=dtype, seed=3).transpose(1, 2).requires_grad_()
    cos, sin = drawn(2, 1, 5, 8, dtype=dtype, seed=4)
    return {rms_norm: (x, weight, 0.5), swiglu: (x, up), rotary: (heads, cos, sin)}


def board(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotated(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


FORMULAS = {rms_norm: board, swiglu: lambda g, u: F.silu(g) * u, rotary: rotated}
ALL = pytest.mark.parametrize("op", FORMULAS, ids=lambda op: op.__name__)


@ALL
def test_is_the_formula_and_has_its_gradients_also_of_second_order(op):
    args = operands()[op]
    torch.testing.assert_close(op(*args), FORMULAS[op](*args))
    tensors = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]

    def call(*given):
        return op(*given, *args[len(given) :])

    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


@ALL
@pytest.mark.parametrize("dtype", DTYPES)
def test_passes_opcheck(op, dtype):
    args = operands(dtype)[op]
    torch.library.opcheck(getattr(OPS, op.__name__), args)


def test_backward_operations_pass_opcheck():
    x, weight, _ = (t.detach() if isinstance(t, torch.Tensor) else t for t in operands(torch.float32)[rms_norm])
    r = OPS.rms_norm(x, weight, 1e-3)[1]
    for need_weight in (False, True):
        torch.library.opcheck(OPS.rms_norm_backward, (x, x, weight, r, need_weight))
    torch.library.opcheck(OPS.swiglu_backward, (x, x, x))
    heads, cos, sin = (t.detach() for t in operands(torch.float32)[rotary])
    torch.library.opcheck(OPS.rotary_backward, (heads, cos, sin))


def test_rotary_backward_is_the_transposed_map():
    x, cos, sin = operands()[rotary]
    turned = [torch.func.jacrev(lambda x: rotary(x, cos, sin))(x.detach()), OPS.rotary_backward(x.detach(), cos, sin)]
    want = torch.einsum("bhtdBHTD,bhtd->BHTD", turned[0], x.detach())
    torch.testing.assert_close(turned[1], want)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_in_one_graph_of_every_size(op, dtype):
    args = operands(dtype)[op]
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(*args), op(*args))
    with torch.no_grad():
        # weights and what is one for all of a batch stay
        longer = [torch.cat((a, a)) if isinstance(a, torch.Tensor) and a.dim() > 1 < len(a) else a for a in args]
        torch.testing.assert_close(compiled(*longer), op(*longer))


@ALL
def test_takes_transforms_and_forward_mode(op):
    x, *rest = (a.detach() if isinstance(a, torch.Tensor) else a for a in operands()[op])
    call, formula = (lambda x, f=f: f(x, *rest).square().sum() for f in (op, FORMULAS[op]))
    torch.testing.assert_close(torch.func.grad(call)(x), torch.func.grad(formula)(x))
    tangent = torch.ones_like(x)
    torch.testing.assert_close(torch.func.jvp(call, (x,), (tangent,)), torch.func.jvp(formula, (x,), (tangent,)))
    many = torch.stack((x, 2 * x))
    torch.testing.assert_close(torch.func.vmap(lambda x: op(x, *rest))(many), torch.stack([op(m, *rest) for m in many]))


@ALL
def test_has_shapes_on_the_meta_device_and_computes_in_its_dtype_under_autocast(op):
    args = operands(torch.float32)[op]
    meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
    made, found = op(*meta), op(*args)
    assert made.is_meta and made.shape == found.shape and made.stride() == found.stride()
    with torch.autocast("cpu", torch.bfloat16):
        under = op(*args)
    assert torch.equal(under, found) and under.dtype == torch.float32


@ALL
def test_result_may_be_changed_in_place(op):
    args = operands()[op]
    y = op(*args)
    y.mul_(2).sum().backward()
    want = torch.autograd.grad(2 * FORMULAS[op](*args).sum(), args[0])[0]
    torch.testing.assert_close(args[0].grad if args[0].is_leaf else want, want)


def test_norm_without_a_gradient_for_x_or_for_its_weight():
    x, weight, eps = operands()[rms_norm]
    want = torch.autograd.grad(board(x, weight, eps).sum(), (x, weight))
    for kept, other in ((x, weight.detach()), (weight, x.detach())):
        args = (kept, other) if kept is x else (other, kept)
        got = torch.autograd.grad(rms_norm(*args, eps).sum(), kept)[0]
        torch.testing.assert_close(got, want[kept is weight])


@ALL
def test_a_gradient_that_may_be_differentiated_is_the_same(op):
    """Which a check of second derivatives takes for granted."""
    args = operands()[op]
    tensors = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    grads = torch.autograd.grad(op(*args).square().sum(), tensors, create_graph=True)
    truth = torch.autograd.grad(FORMULAS[op](*args).square().sum(), tensors)
    for got, want in zip(grads, truth, strict=True):
        torch.testing.assert_close(got, want)


@ALL
def test_tangents_outside_a_transform(op):
    x, *rest = (a.detach() if isinstance(a, torch.Tensor) else a for a in operands()[op])
    want = torch.func.jvp(lambda x: FORMULAS[op](x, *rest), (x,), (2 * x,))[1]
    with forward_ad.dual_level():
        y = op(forward_ad.make_dual(x, 2 * x), *rest)
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, want)


def test_eps_may_be_nothing_and_a_whole_number():
    x, weight, _ = operands()[rms_norm]
    torch.testing.assert_close(rms_norm(x, weight, 0), board(x, weight, 0))


def test_cosines_that_are_trained_elsewhere_are_taken_where_no_gradient_is_made():
    x, cos, sin = operands()[rotary]
    with torch.no_grad():
        assert torch.equal(rotary(x, cos.clone().requires_grad_(), sin), rotary(x, cos, sin))


class Kept(torch.autograd.Function):
    """Hands on what it is given, and gives nothing back."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, d_y):
        return None


@ALL
def test_an_output_whose_gradient_is_none_gives_nothing(op):
    args = operands()[op]
    x = args[0].detach().requires_grad_()
    (Kept.apply(op(x, *args[1:])).sum() + x.sum()).backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    if op is rms_norm:
        assert args[1].grad is None


def test_a_norm_has_no_gradient_through_the_roots_it_keeps():
    y, r = OPS.rms_norm(*operands()[rms_norm])
    assert y.requires_grad and not r.requires_grad


def test_a_norm_whose_weight_is_frozen_makes_no_gradient_of_it(monkeypatch):
    x, weight, eps = operands()[rms_norm]
    module, asked = importlib.import_module("lora_core.ops.rms_norm"), []
    run = module.gradients
    monkeypatch.setattr(module, "gradients", lambda *given: asked.append(given[-1]) or run(*given))
    for kept in (weight.detach(), weight):
        rms_norm(x, kept, eps).sum().backward()
    assert asked == [False, True]


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda x: rms_norm(x, x[0, 0, :4], 1e-6), ShapeError, r"weight \(4,\)"),
        (lambda x: rms_norm(x[0, 0, 0], x[0, 0], 1e-6), ShapeError, r"want x \[..., K\]"),
        (lambda x: rms_norm(x[0, 0, 0], x[0, 0, 0], 1e-6), ShapeError, r"weight \(\)"),
        (lambda x: rms_norm(x, x[0, 0, :, None].expand(8, 2), 1e-6), ShapeError, r"weight \(8, 2\)"),
        (lambda x: rms_norm(x[..., :0], x[0, 0, :0], 1e-6), ShapeError, "K at least 1"),
        (lambda x: rms_norm(x, x[0, 0], -1.0), ConfigError, "eps is -1.0"),
        (lambda x: rms_norm(x, x[0, 0], float("nan")), ConfigError, "eps is nan"),
        (lambda x: rms_norm(x, x[0, 0], float("inf")), ConfigError, "eps is inf"),
        (lambda x: rms_norm(x, x[0, 0], "small"), ConfigError, "eps is 'small'"),
        (lambda x: rms_norm(x, x[0, 0].half(), 1e-6), DtypeError, "x torch.float32, weight torch.float16"),
        (lambda x: rms_norm(x.int(), x[0, 0].int(), 1e-6), DtypeError, "one floating dtype"),
        (lambda x: rms_norm([1.0], x[0, 0], 1e-6), DtypeError, "x is a list"),
        (lambda x: rms_norm(x, x[0, 0].to("meta"), 1e-6), DeviceError, "weight on meta"),
        (lambda x: swiglu(x, x[:1]), ShapeError, r"up \(1, 3, 8\)"),
        (lambda x: swiglu(x, x.double()), DtypeError, "up torch.float64"),
        (lambda x: swiglu(*(torch.nested.nested_tensor([x[0], x[1]]),) * 2), DtypeError, "is nested"),
        (lambda x: swiglu(x.to_sparse(), x), DtypeError, r"to_dense\(\)"),
        (lambda x: rotary(x, x, x), ShapeError, r"x \(2, 3, 8\)"),
        (lambda x: rotary(x[None], x[:1], x), ShapeError, r"sin \(2, 3, 8\)"),
        (lambda x: rotary(x[None, ..., :7], x[:1, :, :7], x[:1, :, :7]), ShapeError, "D even"),
        (lambda x: rotary(x[None], x[:1].double(), x[:1]), DtypeError, "cos torch.float64"),
        (lambda x: rotary(x[None, :, :2], x[:1], x[:1]), ShapeError, r"x \(1, 2, 2, 8\)"),
        (lambda x: rotary(x[None].expand(3, 2, 3, 8), x, x), ShapeError, r"cos \(2, 3, 8\)"),
        (lambda x: rotary(x[None], x[:1], x[:1].clone().requires_grad_()), ConfigError, r"\.detach\(\)"),
        (lambda x: rotary(x[None], x[:1].clone().requires_grad_(), x[:1]), ConfigError, r"\.detach\(\)"),
    ],
)
def test_says_what_does_not_fit(call, error, said):
    with pytest.raises(error, match=said):
        call(drawn(2, 3, 8, dtype=torch.float32))
