"""lora_core::lora_linears: what several layers give alone, their gradients, compilation, refusals."""

import weakref

import pytest
import torch
from lora_bounds import check_backward_of_several, check_forward
from strategies import linear_operands

import lora_core as lc
from lora_core.cpu import lora_linears as cpu
from lora_core.ops.layer import Layer
from lora_core.ops.lora_linear import lora_linear
from lora_core.ops.lora_linears import lora_linears, op
from lora_core.ops.nf4_lora_linear import nf4_lora_linear
from lora_core.ops.packed import Packed, flatten, unflatten
from lora_core.reference import lora_linears as reference

COLUMNS = 32
SHAPES = ((7, 3), (9, 2), (6, 16))


def layers(dtype=torch.float32, low=None, dropout=0.0, packed=(2,), bias=True, grad=False):
    """Layers of one x; those in packed have an NF4 weight."""
    made = []
    for i, (n, r) in enumerate(SHAPES):
        _, weight, b, lora_a, lora_b = linear_operands(1, n, COLUMNS, r, dtype, low or dtype, 4 * i)
        w = Packed.of(lc.quantize_nf4(weight.float(), double_quant=i == 2)) if i in packed else weight
        pair = (t.requires_grad_(grad) for t in (lora_a, lora_b))
        seed = torch.tensor([i + 5]) if dropout else None
        made.append(Layer(w, b if bias else None, *pair, 0.5 - i, dropout, seed))
    return made


def dense(layer, dtype):
    return layer.weight if isinstance(layer.weight, torch.Tensor) else layer.weight.dense(dtype)


def inputs(dtype=torch.float32, lead=(5,), grad=True):
    return torch.randn(*lead, COLUMNS, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_(grad)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("low", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lora_linears_match_the_formula_forward_and_backward(dtype, low, dropout):
    x, made = inputs(dtype), layers(dtype, low, dropout, grad=True)
    ys = lora_linears(x, made)
    d_ys = [torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype) for y in ys]
    leaves = [x, *(t for layer in made for t in (layer.lora_a, layer.lora_b))]
    d_x, *pairs = torch.autograd.grad(ys, leaves, d_ys)
    checked = []
    hidden = op(*_arguments(x.detach(), made))[-1].split([len(layer.lora_a) for layer in made], 1)
    for y, layer, s in zip(ys, made, hidden, strict=True):
        rest = (dense(layer, dtype), layer.bias, layer.lora_a, layer.lora_b, layer.scaling, dropout, layer.seed)
        assert y.dtype == dtype
        check_forward(y.detach(), x, *rest, s)
        checked.append((rest[0], *rest[2:4], s, *rest[4:]))
    check_backward_of_several(d_x, list(zip(pairs[::2], pairs[1::2], strict=True)), d_ys, checked, x)


def _arguments(x, made):
    weights, biases, lora_as, lora_bs, scalings, dropouts, seeds = map(list, zip(*made, strict=True))
    biases = [x.new_empty(0) if b is None else b for b in biases]
    seeds = [torch.empty(0, dtype=torch.int64) if s is None else s for s in seeds]
    return x, *flatten(weights), biases, lora_as, lora_bs, scalings, dropouts, seeds


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_lora_linears_gradient_matches_finite_differences(dropout):
    x, made = inputs(torch.float64, (2, 3)), layers(torch.float64, None, dropout, grad=True)
    leaves = [x, *(t for layer in made for t in (layer.lora_a, layer.lora_b))]
    assert torch.autograd.gradcheck(lambda *_: lora_linears(x, made), leaves)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
def test_lora_linears_pass_pytorchs_operator_check(bias, dropout):
    results = torch.library.opcheck(op, _arguments(inputs(), layers(dropout=dropout, bias=bias, grad=True)))
    assert set(results.values()) == {"SUCCESS"}


def test_one_layer_without_dropout_gives_the_bits_of_lora_linear():
    x = inputs(grad=False)
    for layer in layers(packed=()):
        assert torch.equal(lora_linears(x, [layer])[0], lora_linear(x, *layer))
    layer = layers()[2]
    got = lora_linears(x, [layer])[0]
    weight = linear_operands(1, 6, COLUMNS, 16, torch.float32, torch.float32, 8)[1]
    assert torch.equal(got, nf4_lora_linear(x, lc.quantize_nf4(weight), *layer[1:]))


@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 0), (2, 3, 4)], ids=str)
def test_lora_linears_take_any_leading_dimensions(lead):
    x, made = inputs(lead=lead), layers(grad=True)
    ys = lora_linears(x, made)
    assert [y.shape for y in ys] == [(*lead, n) for n, _ in SHAPES]
    sum(y.sum() for y in ys).backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("used", [[1], [0, 2], [2]], ids=str)
def test_a_layer_whose_output_is_not_used_has_no_gradient(used):
    """As if it had not been called: AdamW would shrink weights whose gradient is zero."""
    x, made = inputs(), layers(grad=True)
    pairs = [(layer.lora_a, layer.lora_b) for layer in made]
    leaves = [x, *(t for pair in pairs for t in pair)]
    ys = lora_linears(x, made)
    d_ys = [torch.randn_like(ys[i]) for i in used]
    got = torch.autograd.grad([ys[i] for i in used], leaves, d_ys, retain_graph=True, allow_unused=True)
    of_layers = list(zip(got[1::2], got[2::2], strict=True))
    assert all(t is None for i, pair in enumerate(of_layers) if i not in used for t in pair)
    hidden = op(*_arguments(x.detach(), made))[-1].split([len(layer.lora_a) for layer in made], 1)
    checked = [(dense(made[i], x.dtype), *pairs[i], hidden[i], made[i].scaling, 0.0, None) for i in used]
    check_backward_of_several(got[0], [of_layers[i] for i in used], d_ys, checked, x)


def test_losses_of_layers_together_say_how_they_can_go_backward_one_by_one():
    made = layers(grad=True)
    ys = lora_linears(inputs(), made)
    ys[0].sum().backward(retain_graph=True)
    ys[1].sum().backward()
    with pytest.raises(RuntimeError, match=r"second time.*have one backward.*share=False"):
        ys[2].sum().backward()


def test_frozen_weights_may_change_before_the_backward_of_a_frozen_x():
    made = layers(grad=True)
    ys = lora_linears(inputs(grad=False), made)
    for layer in made:
        (layer.weight if isinstance(layer.weight, torch.Tensor) else layer.weight.codes).mul_(1)
    torch.autograd.backward([y.sum() for y in ys])
    assert all(layer.lora_a.grad is not None for layer in made)


@pytest.mark.parametrize("need_x", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_lora_linears_make_just_the_gradients_that_are_needed(need_x, grad):
    """The same bits as where all are needed."""
    x, made = inputs(grad=need_x), layers(grad=grad)
    leaves = [x] * need_x + [t for layer in made for t in (layer.lora_a, layer.lora_b)] * grad
    ys = lora_linears(x, made)
    if not leaves:
        assert not any(y.requires_grad for y in ys)
        return
    whole = inputs(), layers(grad=True)
    everything = [whole[0], *(t for layer in whole[1] for t in (layer.lora_a, layer.lora_b))]
    got = torch.autograd.grad(sum(y.sum() for y in ys), leaves)
    want = torch.autograd.grad(sum(y.sum() for y in lora_linears(*whole)), everything)
    wanted = want[:1] * need_x + want[1:] * grad
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_lora_linears_compile_to_one_graph():
    x, made = inputs(), layers(dropout=0.3, grad=True)
    run = torch.compile(lambda x: lora_linears(x, made), fullgraph=True, backend="aot_eager")
    for got, want in zip(run(x), lora_linears(x, made), strict=True):
        assert torch.equal(got, want)


def test_lora_linears_follow_autocast():
    x, made = inputs(), layers()
    with torch.autocast("cpu", torch.bfloat16):
        ys = lora_linears(x, made)
    halves = [
        layer._replace(
            weight=layer.weight.bfloat16() if isinstance(layer.weight, torch.Tensor) else layer.weight,
            bias=layer.bias.bfloat16(),
            lora_a=layer.lora_a.bfloat16(),
            lora_b=layer.lora_b.bfloat16(),
        )
        for layer in made
    ]
    want = lora_linears(x.bfloat16(), halves)
    assert all(y.dtype == torch.bfloat16 and torch.equal(y, w) for y, w in zip(ys, want, strict=True))


def test_lora_linears_change_no_input():
    x, made = inputs(grad=False), layers(dropout=0.3)
    tensors = [x, *(t for layer in made for t in layer if isinstance(t, torch.Tensor)), *flatten([made[2].weight])[0]]
    before = [t.clone() for t in tensors]
    lora_linears(x, made)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_lists_of_weights_come_back_from_their_flat_form():
    made = [layer.weight for layer in layers(packed=(1, 2))]
    back = list(unflatten(*flatten(made)))
    assert torch.equal(back[0], made[0])
    for got, want in zip(back[1:], made[1:], strict=True):
        assert isinstance(got, Packed) and tuple(got.shape) == tuple(want.shape) and got[5:] == want[5:]
        assert all(a is b for a, b in zip(got[:4], want[:4], strict=True))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"lora_a": torch.zeros(2, 31)}, lc.ShapeError, r"layer 1.*lora_a \(2, 31\)"),
        ({"bias": torch.zeros(9).half()}, lc.DtypeError, "layer 1.*bias torch.float16"),
        ({"dropout": 1.5}, lc.ConfigError, "layer 1.*dropout is 1.5"),
        ({"dropout": 0.5}, lc.ConfigError, "layer 1.*needs a seed"),
        ({"weight": torch.zeros(9, 32, requires_grad=True)}, lc.ConfigError, "weight requires a gradient.*lora_linear"),
        ({"lora_b": torch.zeros(9, 2, device="meta")}, lc.DeviceError, "layer 1.*lora_b on meta"),
    ],
)
def test_lora_linears_refuse_what_does_not_fit(change, error, says):
    made = layers(packed=())
    made[1] = made[1]._replace(**change)
    with pytest.raises(error, match=says):
        lora_linears(inputs(), made)


def test_lora_linears_refuse_no_layers_and_pairs_of_two_dtypes():
    with pytest.raises(lc.ConfigError, match="empty"):
        lora_linears(inputs(), [])
    mixed = [*layers(torch.bfloat16)[:1], *layers(torch.bfloat16, torch.float32)[1:2]]
    with pytest.raises(lc.DtypeError, match="one dtype.*bfloat16.*float32"):
        lora_linears(inputs(torch.bfloat16), mixed)


@pytest.mark.parametrize(
    ("forward", "backward"),
    [(reference.forward, reference.backward), (cpu._forward, cpu._backward)],
    ids=["reference", "cpu"],
)
def test_one_dequantised_weight_is_alive_at_a_time(forward, backward):
    made, x, d_ys = [], torch.randn(5, 8), [torch.randn(5, n) for n in (6, 7, 4)]

    def weights():
        for d_y in d_ys:
            assert not any(w() is not None for w in made)
            w = torch.randn(d_y.shape[1], 8)
            made.append(weakref.ref(w))
            yield w
            del w

    lora_as, lora_bs = [torch.randn(2, 8)] * 3, [torch.randn(d_y.shape[1], 2) for d_y in d_ys]
    rest = ([0.5] * 3, [0.0] * 3, [None] * 3)
    ys, hidden = forward(x, weights(), [None] * 3, lora_as, lora_bs, *rest)
    made.clear()
    d_x, *_ = backward(d_ys, x, weights(), lora_as, lora_bs, hidden, *rest, True, True)
    assert len(ys) == len(made) == 3 and d_x.shape == x.shape


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace")
def test_lora_linears_can_be_traced():
    weight, a, b = torch.randn(8, 16), torch.randn(2, 16), torch.randn(8, 2)

    def run(x):
        return lora_linears(x, [Layer(weight, None, a, b, 2.0)])[0]

    x = torch.randn(5, 16)
    assert torch.equal(torch.jit.trace(run, (torch.randn(3, 16),))(x), run(x))
