"""What goes on with a fused model: optimisers, PEFT's methods, checkpointing, compiling, autocast, copies."""

import copy
import pickle

import peft
import pytest
import torch
from fusible import (
    HALF,
    MAKERS,
    MARKS,
    TARGETS,
    WIDTH,
    Projections,
    with_peft,
)
from lora_bounds import check_forward
from models import randomise
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_core as lc
from lora_core.layers.fused import Fused

pytestmark = MARKS


def steps(model, optimiser, count):
    found = []
    g = torch.Generator().manual_seed(5)
    for _ in range(count):
        x, want = torch.randn(8, WIDTH, generator=g), torch.randn(8, 7, generator=g)
        loss = (model(x) - want).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("name", ["own", "own nf4", "peft", "peft 4-bit"])
def test_an_optimiser_from_before_fuse_goes_on_as_without(name):
    """Losses follow the unfused run as near as it follows itself from weights moved by one unit in the last place."""
    curves = []
    for fused, end in ((False, None), (True, None), *((False, end) for end in (torch.inf, -torch.inf))):
        model = MAKERS[name]().train()
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for parameter in trained if end is not None else ():
                parameter.copy_(torch.nextafter(parameter, torch.tensor(end)))
        optimiser = torch.optim.AdamW(trained, lr=1e-2)
        first = steps(model, optimiser, 2)
        if fused:
            lc.fuse(model)
        curves.append(torch.cat([first, steps(model, optimiser, 6)]))
    plain, fused, *nudged = curves
    spread = torch.stack([(curve - plain).abs() for curve in nudged]).max(0).values.cummax(0).values
    assert plain[-1] < plain[0]
    assert bool(((fused - plain).abs() <= 2 * (spread + torch.finfo(torch.float32).eps * plain)).all())


def test_peft_goes_on_with_a_fused_model():
    """Disabling, switching, merging, unloading and saving do what they do without."""
    model, x = with_peft(Projections()).eval(), torch.randn(4, WIDTH)
    model.add_adapter("other", peft.LoraConfig(target_modules=TARGETS, r=3))
    randomise(model)
    plain = copy.deepcopy(model)
    assert len(lc.fuse(model).swapped) == 2
    with model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(model(x), plain(x))
    layer, other = (m.base_model.model.q_proj for m in (model, plain))
    mixed = {"adapter_names": ["default", "__base__", "other", "default"]}
    assert torch.equal(layer(x, **mixed), other(x, **mixed))
    for both in (model, plain):
        both.set_adapter("other")
    base, pair = layer.base_layer, (layer.lora_A["other"].weight, layer.lora_B["other"].weight)
    check_forward(layer(x).detach(), x, base.weight, base.bias, *pair, layer.scaling["other"])
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.merge_adapter(), plain.merge_adapter()
    assert torch.equal(model(x), plain(x))
    model.unmerge_adapter(), plain.unmerge_adapter()
    assert torch.equal(model.merge_and_unload()(x), plain.merge_and_unload()(x))


def test_fused_model_trains_under_checkpointing_as_without():
    model = with_peft(Projections(), lora_dropout=0.3).train()
    lc.fuse(model)
    x = torch.randn(5, WIDTH)
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(0)
        grads.append(torch.autograd.grad(run(x).square().sum(), trained))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("name", ["own", "peft", "peft 4-bit", "bitsandbytes"])
def test_fused_model_compiles_without_a_graph_break(name):
    model = MAKERS[name]().eval()
    lc.fuse(model)
    x = torch.randn(5, WIDTH)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("name", MAKERS)
def test_fused_model_runs_under_autocast_as_in_half_precision(name):
    model = MAKERS[name]()
    lc.fuse(model)
    x = torch.randn(5, WIDTH)
    with torch.autocast("cpu", dtype=HALF):
        fused = model(x)
        lc.unfuse(model)
        plain = model(x)
    assert fused.dtype == plain.dtype
    # both round at every layer: a few of 256 steps apart at the size of the output
    assert (fused - plain).abs().max() <= 8 * torch.finfo(HALF).eps * plain.abs().max()


@pytest.mark.parametrize("name", ["own", "peft", "bitsandbytes"])
def test_fused_model_can_be_copied_and_pickled(name):
    model = MAKERS[name]().eval()
    lc.fuse(model)
    x = torch.randn(5, WIDTH)
    duplicate = copy.deepcopy(model)
    assert torch.equal(duplicate(x), model(x))
    with torch.no_grad():
        next(p for n, p in duplicate.named_parameters() if "bias" in n).add_(1)
    assert not torch.equal(duplicate(x), model(x))
    layer = next(m for m in model.modules() if isinstance(m, Fused))
    if name != "peft":
        back = pickle.loads(pickle.dumps(layer))
        assert type(back) is type(layer) and torch.equal(back(x), layer(x))
    lc.unfuse(duplicate)
    assert not any(isinstance(m, Fused) for m in duplicate.modules())


def test_adapters_on_a_model_fused_before_are_fused():
    model = lc.quantize_model(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), skip_modules=[])
    lc.fuse(model)
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0", "1"]))
    wanted = model(torch.ones(2, 64))
    assert lc.fuse(model).swapped == ["0", "1"] and all(layer.is_as_written() for layer in model)
    assert torch.equal(model(torch.ones(2, 64)), wanted)


def test_an_adapter_that_is_more_than_lora_runs_as_pefts_in_a_layer_fused_before():
    model = with_peft(Projections())
    lc.fuse(model)
    model.add_adapter("dora", peft.LoraConfig(target_modules=TARGETS, r=4, use_dora=True))
    randomise(model)
    model.set_adapter("dora")
    x = torch.randn(3, WIDTH)
    assert torch.equal(model(x), lc.unfuse(copy.deepcopy(model))(x))
