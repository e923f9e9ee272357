"""Layers that fuse leaves as they are, each with the reason."""

import functools

import bitsandbytes as bnb
import peft
import pytest
from fusible import MARKS, NOTHING, WIDTH, Projections, in_four_bits, linear4bit, own, with_peft
from torch import nn

import lora_core as lc
from lora_core.layers.fused import Fused

pytestmark = MARKS


def skipped(model):
    return {n.rpartition(".")[2]: reason for n, reason in lc.fuse(model).skipped.items() if reason != NOTHING}


def hooked(model, name="base_model.model.q_proj.base_layer"):
    model.get_submodule(name).register_forward_hook(lambda *args: None)
    return model


def patched(model):
    layer = model.get_submodule("base_model.model.q_proj")
    layer.forward = functools.partial(type(layer).forward, layer)
    return model


def altered(change):
    """A 4-bit layer whose state is other than what bitsandbytes makes, or is no longer."""
    layer = linear4bit(nn.Linear(WIDTH, 8))
    change(layer.weight.quant_state)
    return nn.Sequential(layer)


def halve(state):
    """The map of levels is shared among layers: another one, and not changed in place."""
    state.code = state.code / 2


REASONS = {
    "repacked": (lambda: altered(lambda s: setattr(s, "packing_format_for_cpu", True)), "repacked for CPU", 1),
    "block size": (lambda: altered(lambda s: setattr(s, "blocksize", 16)), "its blocksize is 16: want one of", 1),
    "levels": (lambda: altered(halve), "its quant_map is not the NF4 codebook", 1),
    "levels of scales": (lambda: altered(lambda s: halve(s.state2)), "its nested_quant_map is not the signed", 1),
    "own hooks": (lambda: hooked(own(), "q_proj.base_layer"), "its base layer has hooks", 1),
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


def test_fuse_skips_layers_of_a_class_derived_from_pefts():
    """Its forward may be another than the one that is fused."""

    class Doubled(peft.tuners.lora.layer.Linear):
        def forward(self, x, *args, **kwargs):
            return 2 * super().forward(x, *args, **kwargs)

    model = with_peft(Projections())
    layer = model.get_submodule("base_model.model.q_proj")
    layer.__class__ = Doubled
    assert skipped(model) == {"q_proj": f"PEFT's {__name__}.Doubled has no fused operation"}
    assert type(layer) is Doubled


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


def test_fuse_of_a_model_without_such_layers_reports_nothing():
    report = lc.fuse(nn.Sequential(nn.LayerNorm(4), nn.GELU()))
    assert report.swapped == [] and report.skipped == {}
    assert str(report) == "0 layers fused, 0 left as they are"


def test_fuse_takes_a_layer_whose_name_begins_like_the_one_before():
    model = nn.ModuleDict({"fc": nn.Linear(WIDTH, 8), "fc2": nn.Linear(WIDTH, 8)})
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["fc", "fc2"]))
    assert lc.fuse(model).swapped == ["fc", "fc2"]
