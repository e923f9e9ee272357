"""What a fused attention computes by the operation and what it leaves, and which attentions are known."""

import functools
import warnings
from unittest import mock

import pytest
import torch
import transformers
from small_transformers import MARKS, SIZES, attentions, calls_of, model_of
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.integrations import sdpa_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

import lora_core as lc
from lora_core.layers import block_attention
from lora_core.layers.block_attention import FusedAttention, FusedRotatingAttention

pytestmark = MARKS


def operands(heads=4, groups=2, tokens=6, d=8, e=8, batch=2):
    g = torch.Generator().manual_seed(0)
    shapes = ((batch, heads, tokens, d), (batch, groups, tokens, d), (batch, groups, tokens, e))
    return [torch.randn(shape, generator=g) for shape in shapes]


def attend(module, q, k, v, mask=None, *rest, **options):
    """What a fused attention calls for PyTorch's attention."""
    return block_attention._attending(sdpa_attention_forward)(module, q, k, v, mask, *rest, **options)


class Attention(nn.Module):
    def __init__(self, groups=2, **fields):
        super().__init__()
        self.num_key_value_groups = groups
        for name, value in fields.items():
            setattr(self, name, value)


def with_options(**options):
    return lambda q, k, v: ((Attention(), q, k, v), options)


TAKEN = {
    "no options": with_options(),
    "a scaling": with_options(scaling=0.3),
    "what the function does not look at": with_options(
        position_ids=torch.arange(6), use_cache=True, sliding_window=3, cu_seq_lens_q=torch.tensor([0, 6])
    ),
    "what it looks at, and is absent": with_options(
        position_bias=None, cache=None, softcap=None, output_attentions=False, dropout=0
    ),
    "causal, said twice": lambda q, k, v: ((Attention(is_causal=True), q, k, v), {"is_causal": True}),
    "causal by the call": lambda q, k, v: ((Attention(is_causal=False), q, k, v), {"is_causal": True}),
    "as many keys as queries": lambda q, k, v: ((Attention(1), q[:, :2], k, v), {}),
    "no groups": lambda q, k, v: ((nn.Identity(), q[:, :2], k, v), {}),
    "values of another width": lambda q, k, v: ((Attention(), q, k, v[..., :5]), {}),
    "any strides": lambda q, k, v: (
        (Attention(), q.flip(2).transpose(1, 2).contiguous().transpose(1, 2), k.mT.contiguous().mT, v),
        {},
    ),
}


@pytest.mark.parametrize("what", TAKEN)
def test_what_the_operation_takes(what, monkeypatch):
    given, options = TAKEN[what](*operands())
    want = sdpa_attention_forward(*given, None, **options)
    count = attentions(monkeypatch)
    got = attend(*given, **options)
    torch.testing.assert_close(got[0], want[0])
    assert got[1] is None and got[0].is_contiguous() and count() == 1


class Marked(torch.Tensor):
    """A tensor class of somebody else's."""


LEFT = {
    "a mask": lambda q, k, v: ((Attention(), q, k, v, torch.zeros(2, 1, 6, 6)), {}),
    "no scaling": lambda q, k, v: ((Attention(), q, k, v, None), {"scaling": 0.0}),
    "scaling that is no number": lambda q, k, v: ((Attention(), q, k, v, None), {"scaling": float("nan")}),
    "more by position": lambda q, k, v: ((Attention(), q, k, v, None, 0.0, 0.3), {}),
    "a bias": lambda q, k, v: ((Attention(1), q[:, :2], k, v, None), {"position_bias": torch.ones(1, 2, 6, 6)}),
    "not causal by the call": lambda q, k, v: ((Attention(is_causal=True), q, k, v, None), {"is_causal": False}),
    "not causal by the module": lambda q, k, v: ((Attention(is_causal=False), q, k, v, None), {}),
    "attention asked for": lambda q, k, v: ((Attention(), q, k, v, None), {"output_attentions": True}),
    "more keys than queries": lambda q, k, v: ((Attention(), q[:, :, :4], k, v, None), {}),
    "one query": lambda q, k, v: ((Attention(), q[:, :, :1], k, v, None), {}),
    "one token": lambda q, k, v: ((Attention(), q[:, :, :1], k[:, :, :1], v[:, :, :1], None), {}),
    "another dtype": lambda q, k, v: ((Attention(), q.double(), k.double(), v.double(), None), {}),
    "a tensor class": lambda q, k, v: ((Attention(), q.as_subclass(Marked), k, v, None), {}),
    "queries of one sequence": lambda q, k, v: ((Attention(1), q[:1, :2], k, v, None), {}),
}


@pytest.mark.parametrize("what", LEFT)
def test_what_is_left_to_transformers_function(what, monkeypatch):
    given, options = LEFT[what](*operands())
    want = sdpa_attention_forward(*given, **options)
    count = attentions(monkeypatch)
    got = attend(*given, **options)
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=0, equal_nan=True)
    assert got[1] is None and count() == 0


def test_under_autocast_it_is_transformers_function(monkeypatch):
    count = attentions(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(Attention(), *operands())[0].dtype == torch.bfloat16
    assert count() == 0


def test_what_is_no_faster_is_left_to_transformers_function(monkeypatch):
    asked = []
    monkeypatch.setattr(block_attention, "is_better", lambda *given: asked.append(given[3]))
    count = attentions(monkeypatch)
    given = Attention(), *operands()
    for options, scale in (({}, 8**-0.5), ({"scaling": 0.3}, 0.3)):
        assert torch.equal(attend(*given, **options)[0], sdpa_attention_forward(*given, None, **options)[0])
        assert asked.pop() == scale
    assert count() == 0


def told_to_attend_otherwise():
    """The ways to tell PyTorch, which watch its own function or forbid what it would choose."""
    own = torch.nn.functional.scaled_dot_product_attention
    yield mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", lambda *a, **o: own(*a, **o))
    yield sdpa_kernel(SDPBackend.MATH)


def test_where_pytorch_is_told_how_to_attend_it_does(monkeypatch):
    given = Attention(), *operands()
    count = attentions(monkeypatch)
    for told in told_to_attend_otherwise():
        with told:
            assert torch.equal(attend(*given)[0], sdpa_attention_forward(*given, None)[0])
        assert count() == 0
    attend(*given)
    assert count() == 1


def test_pytorchs_attention_that_was_replaced_before_is_seen():
    """By those who watch it from before this library was imported on."""
    assert block_attention.SDPA is torch.nn.functional.scaled_dot_product_attention
    assert block_attention.SDPA is torch._C._nn.scaled_dot_product_attention


def test_what_keeps_pytorch_from_attending_now_is_asked_about_again():
    block_attention._attends_causally.cache_clear()
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        assert block_attention.sdpa_forward() is None
    assert block_attention.sdpa_forward() is sdpa_attention_forward


def test_a_wrapped_function_of_transformers_is_left_and_taken_again_when_it_is_bare(monkeypatch):
    module, given = Asks(), operands(heads=2)
    count = attentions(monkeypatch)
    lc.fuse(module, blocks=True)
    with monkeypatch.context() as patch:
        patch.setattr(sdpa_attention, "sdpa_attention_forward", functools.wraps(sdpa_attention_forward)(lambda: None))
        module(*given)
        assert count() == 0
    module(*given)
    assert count() == 1


def test_a_warning_is_given_once():
    module = Warns()
    q, k, v = operands(heads=2)
    lc.fuse(module, blocks=True)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("default")
        for _ in range(3):
            module(q, k, v)
    assert [str(w.message) for w in given] == ["attends"]


def test_what_comes_first_may_be_no_rows_of_tokens():
    assert not block_attention._are_single(torch.ones(3)) and not block_attention._are_single(1, None)
    assert block_attention._are_single(None, torch.ones(2, 1, 4)) and not block_attention._are_single(
        torch.ones(2, 2, 4)
    )
    assert not block_attention._are_single(torch.ones(2, 1, 4, device="meta"))


REFUSED = {
    "a cap": lambda q, k, v: ((Attention(), q, k, v, None), {"softcap": 30.0}),
    "dtypes that differ": lambda q, k, v: ((Attention(), q, k.double(), v, None), {}),
    "keys of another width": lambda q, k, v: ((Attention(), q, k[..., :4], v, None), {}),
    "keys for no whole group": lambda q, k, v: ((Attention(1), q[:, :3], k, v, None), {}),
    "groups that the module has not": lambda q, k, v: ((Attention(1), q, k, v, None), {}),
    "no sequence": lambda q, k, v: ((Attention(), q[:0], k[:0], v[:0], None), {}),
    "dropout that is no number": lambda q, k, v: ((Attention(), q, k, v, None), {"dropout": None}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_transformers_function_refuses_it_refuses_in_its_own_words(what):
    given, options = REFUSED[what](*operands())
    said = []
    for run in (sdpa_attention_forward, attend):
        with pytest.raises((ValueError, RuntimeError, TypeError)) as error:
            run(*given, **options)
        said.append((error.type, str(error.value)))
    assert said[0] == said[1]


class Subscripts(nn.Module):
    """Asks the registry as a mapping, too."""

    def forward(self, q, k, v):
        ask = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
        return ask(self, q, k, v, None)[0] + ALL_ATTENTION_FUNCTIONS["sdpa"](self, q, k, v, None)[0]


class SubscriptsInside(nn.Module):
    """The same, in a function of its own."""

    def forward(self, q, k, v):
        found = [ALL_ATTENTION_FUNCTIONS[name] for name in ("sdpa",)]
        return ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", found)(self, q, k, v, None)[0]


TIMES = 0


class Counts(nn.Module):
    """Sets a name of its module, which a forward with names of its own would not."""

    def forward(self, q, k, v):
        global TIMES
        TIMES += 1
        return ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)(self, q, k, v, None)[0]


class Asks(nn.Module):
    """Has names of its own for what fused classes have."""

    attend = "attend"

    def forward(self, q, k, v, *, scaling=0.5):
        assert isinstance(self, __class__) and self.attend == "attend"
        return ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)(self, q, k, v, None, scaling=scaling)[0]


class Warns(Asks):
    def forward(self, q, k, v):
        warnings.warn("attends", stacklevel=1)
        return ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)(self, q, k, v, None)[0]


class NeverCausal(Asks):
    is_causal = False


def test_what_asks_is_recognised_by_its_code(monkeypatch):
    q, k, v = operands(heads=2)
    count = attentions(monkeypatch)
    for make in (Subscripts, SubscriptsInside, Counts, NeverCausal):
        module = make()
        want = module(q, k, v)
        report = lc.fuse(module, blocks=True)
        assert report.blocks == [] and report.skipped == {}, make
        assert torch.equal(module(q, k, v), want)
    assert TIMES == 2 and count() == 0
    module = Asks()
    want = module(q, k, v)
    assert lc.fuse(module, blocks=True).blocks == [""]
    assert type(module).fused_by is FusedAttention
    torch.testing.assert_close(module(q, k, v), want)
    assert count() == 1


@pytest.mark.parametrize("of_its_name", [False, True])
def test_a_function_of_transformers_that_computes_something_else_is_left(of_its_name, monkeypatch):
    """Another version may mean another thing by the same name; what somebody put in its place is not asked."""

    def other(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **options):
        found = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal)
        return (2 * found[0] if of_its_name else found[0]), None

    if of_its_name:
        other.__module__, other.__qualname__ = block_attention.SDPA_FORWARD
    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", other)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", other)
    assert block_attention.sdpa_forward() is None
    model = model_of("GPT2")
    assert lc.fuse(model, blocks=True).blocks == []


def test_without_a_function_that_attends_a_rotation_is_fused_alone(monkeypatch):
    monkeypatch.setattr(block_attention, "SDPA_FORWARD", ("transformers", "nothing_of_this_name"))
    # a class of its own: those that were made are kept
    kind = type("Another", (modeling_llama.LlamaAttention,), {})
    layer = kind(transformers.LlamaConfig(**SIZES, attn_implementation="sdpa"), 0)
    assert lc.fuse(layer, blocks=True).blocks == [""] and isinstance(layer, FusedRotatingAttention)
    seen = calls_of(monkeypatch)
    layer(torch.randn(2, 6, 32), (torch.randn(2, 6, 8), torch.randn(2, 6, 8)))
    assert seen == ["rotary"] * 2
