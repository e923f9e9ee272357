"""Layers that a module works with and never calls: no adapter there, and no 4-bit weight."""

import functools
import types

import pytest
import torch
from models import randomise
from torch import Tensor, nn

import lora_core as lc
from lora_core.adapt.bypassed import bypassed
from lora_core.adapt.walk import adapter_layers
from lora_core.layers.nf4_linear import NF4Linear


class Reader(nn.Module):
    """Multiplies by weights itself, asks one what it is like, and calls the rest, one of them elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.passed, self.kept, self.asked, self.both, self.handed, self.plain = (
            nn.Linear(64, 64) for _ in range(7)
        )
        self.initialise()

    def initialise(self) -> None:
        nn.init.normal_(self.plain.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.asked.weight.dtype) if isinstance(self.asked.weight, Tensor) else x
        x = x @ self.read.weight.T + nn.functional.linear(x, self.passed.weight)
        kept = self.kept.weight
        x = self.asked(x @ kept) + self.both(x) @ self.both.weight
        return self.later(self.plain(x))

    def later(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.handed, x, use_reentrant=False)


PAST = {"read", "passed", "kept"}


def test_what_is_never_called_is_read_from_the_source():
    model = nn.Sequential(Reader())
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert {name for name in names if bypassed(model, name)} == {f"0.{name}" for name in PAST}
    # a forward that is patched onto the module, or has no source, calls all
    model[0].forward = model[0].forward
    assert bypassed(model, "0.kept")
    model[0].forward = functools.partial(model[0].forward)
    assert not any(bypassed(model, name) for name in names)
    namespace = {"nn": nn}
    exec("class Unread(nn.Module):\n    def forward(self, x):\n        return x @ self.a.weight", namespace)
    unread = namespace["Unread"]()
    unread.a = nn.Linear(4, 4)
    assert not bypassed(unread, "a")


def test_all_linear_and_quantising_leave_out_what_is_never_called():
    model = nn.Sequential(Reader(), nn.Linear(64, 64))
    lc.quantize_model(model, skip_modules=[])
    assert {n for n, m in model[0].named_children() if not isinstance(m, NF4Linear)} == PAST
    model = nn.Sequential(Reader(), nn.Linear(64, 64))
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules="all-linear"))
    assert not {f"0.{name}" for name in PAST} & adapter_layers(model).keys()
    randomise(model)
    model(torch.randn(3, 64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


class TwoWays(nn.Module):
    """Works with a weight in training, calls the layer elsewhere; what its configuration rules out does not count."""

    def __init__(self, kernels: bool = False) -> None:
        super().__init__()
        self.kernels, self.config = kernels, types.SimpleNamespace()
        self.inner, self.outer, self.steps, self.clamped = (nn.Linear(64, 64) for _ in range(4))
        self.start()

    def start(self) -> None:
        self.inner.weight.data.normal_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        if self.training and self.kernels:
            x = nn.functional.linear(x, self.outer.weight)
            x = torch.relu(x)
        else:
            x = self.outer(x)
        x = self.limit(x)
        if hasattr(self.config, "is_quantized"):
            return self.steps(x)
        else:
            return x @ self.steps.weight

    def limit(self, x: Tensor) -> Tensor:
        weight = self.clamped.weight.clamp(-1, 1)
        assert weight.isfinite().all()
        return self.clamped(x)


def test_what_may_not_be_called_in_training_is_left_out_and_named():
    model = nn.Sequential(TwoWays())
    with pytest.warns(UserWarning, match="'all-linear' leaves out 0.outer: in training their module may work"):
        lc.add_adapter(model, lc.LoraConfig(r=2, target_modules="all-linear"))
    assert adapter_layers(model).keys() == {"0.inner", "0.clamped"}
    with pytest.warns(UserWarning, match="an adapter may do nothing at 0.outer"):
        lc.add_adapter(nn.Sequential(TwoWays()), lc.LoraConfig(r=2, target_modules=["inner", "outer"]))
    with pytest.raises(lc.ConfigError, match="steps belongs to a TwoWays, which uses its weight without calling it"):
        lc.add_adapter(nn.Sequential(TwoWays()), lc.LoraConfig(r=2, target_modules=["steps"]))


def test_the_branch_that_a_module_takes_counts():
    model = nn.Sequential(TwoWays(), TwoWays())
    model[1].config.is_quantized = True
    assert bypassed(model, "0.steps") and not bypassed(model, "1.steps")


class Asking(nn.Module):
    """Conditions that are no question to a plain attribute: an adapter changes the first, a property fails."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.layers = nn.Linear(8, 8), nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 8)])

    @property
    def cache(self) -> object:
        raise RuntimeError("not ready")

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self.one, "base_layer"):
            return self.last(self.one(x))
        return self.last(x @ self.one.weight.T)

    def last(self, x: Tensor) -> Tensor:
        if hasattr(self.layers[0], "weight"):
            return self.two(x)
        return x @ self.two.weight.T

    def later(self) -> None:
        if hasattr(self.cache, "keys"):
            self.two(self.cache)


def test_a_condition_whose_answer_may_change_leaves_both_branches():
    model = nn.Sequential(Asking())
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["one", "two"]))
    model(torch.randn(2, 8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kernels", [False, True])
def test_weights_that_are_worked_with_stay_in_full_precision(kernels):
    model = nn.Sequential(TwoWays(kernels))
    with pytest.warns(UserWarning, match="leaves 0.outer, 0.clamped in full precision"):
        lc.quantize_model(model, skip_modules=[])
    assert isinstance(model[0].inner, NF4Linear)
    model.train(kernels)(torch.randn(3, 64))


def test_an_encoder_that_is_kept_off_its_fast_path_is_adapted_whole():
    model = nn.Sequential(nn.TransformerEncoderLayer(32, 4, 48))
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules="all-linear"))
    assert adapter_layers(model).keys() == {"0.linear1", "0.linear2"}


def test_what_is_never_called_is_refused_by_name_saying_whose_it_is():
    for model in (nn.Sequential(Reader()), nn.Sequential(nn.MultiheadAttention(8, 2))):
        name = "read" if isinstance(model[0], Reader) else "out_proj"
        with pytest.raises(lc.ConfigError, match=f"{name} belongs to a .* without calling it"):
            lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=[name]))


@pytest.mark.peer("transformers")
@pytest.mark.parametrize("kind", ["Mamba", "FalconMamba"])
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.filterwarnings("ignore:target_modules:UserWarning", "ignore:quantize_model:UserWarning")
def test_every_adapter_of_a_state_space_model_is_trained_and_merges(kind, quantised):
    import transformers

    of_kind = getattr(transformers, f"{kind}Config"), getattr(transformers, f"{kind}ForCausalLM")
    model = of_kind[1](of_kind[0](vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4))
    if quantised:
        lc.quantize_model(model, lc.NF4Config(block_size=32))
    lc.add_adapter(model, lc.LoraConfig(r=4, target_modules="all-linear"))
    randomise(model)
    tokens = torch.randint(0, 64, (2, 10))
    model.train()(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    if quantised:
        # merging quantises anew
        return
    with torch.no_grad():
        before = model.eval()(tokens).logits
        lc.merge_adapter(model)
        # merged weights are rounded once
        torch.testing.assert_close(model(tokens).logits, before)
