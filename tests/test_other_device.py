"""What people do with the library, on a device that is not the CPU, through the kernels: see other_device.py."""

import dataclasses
from pathlib import Path

import pytest
import torch
from models import TINY, TinyDecoder, randomise, recompute_activations, tokens, transformers_model
from other_device import DEVICE, apart, launched, run_named
from torch import Tensor, nn

import lora_core as lc

# as torch.testing has it for float32
CLOSE = {"rel": 1.3e-6, "abs": 1e-5}


class Mixed(nn.Module):
    """A layer of each kind that is adapted, in two dimensions and one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 24)
        self.conv1d = nn.Conv1d(24, 16, 3, padding=1)
        self.conv2d = nn.Conv2d(1, 4, 3, stride=2)
        self.out = nn.Linear(28, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1d(self.embed(x).transpose(1, 2))
        return self.out(self.conv2d(y[:, None]).flatten(1)[:, :28])


def the_demo(folder: Path) -> None:
    """The shipped base's weights would take the interpreter minutes: a smaller model takes their place."""
    from lora_core.demo import run
    from lora_core.demo.base import load_base
    from lora_core.demo.model import GPT, GPTConfig
    from lora_core.demo.settings import DemoSettings

    shipped = load_base()
    config = GPTConfig(len(shipped.tokenizer), context=16, width=32, layers=1, heads=2)
    small = dataclasses.replace(shipped, config=config, state=GPT(config).state_dict())
    run.load_base = lambda folder: small
    few = {"batch": 2, "table_windows": 2, "curve_windows": 2, "curve_points": 1, "agreement_windows": 2}
    settings = dataclasses.replace(DemoSettings.quick(), **few)

    there = run.run_demo(folder / "there", settings, torch.device(DEVICE))
    assert there.agreement.agrees and there.agreement.reloaded_difference == 0
    used = {"lora_linear", "lora_linear_backward", "nf4_lora_linear", "nf4_lora_linear_backward", "nf4_quantize"}
    assert used <= launched.keys()
    launched.clear()
    here = run.run_demo(folder / "here", settings, torch.device("cpu"))
    assert not launched
    assert {path.name for path in (folder / "there").iterdir()} == {path.name for path in (folder / "here").iterdir()}
    for ours, theirs in zip(there.rows, here.rows, strict=True):
        same = ("trainable", "weight_bytes", "optimizer_bytes")
        assert all(getattr(ours, name) == getattr(theirs, name) for name in same)
        assert ours.train_curve == pytest.approx(theirs.train_curve, **CLOSE)
        assert dataclasses.astuple(ours.after) == pytest.approx(dataclasses.astuple(theirs.after), **CLOSE)


def test_other_device_runs_the_demo_through_the_kernels(tmp_path):
    apart(the_demo, tmp_path)


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """One step of training: the loss, and every gradient, on the CPU."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return [value.detach().cpu() for value in (loss, *(p.grad for p in trained if p.grad is not None))]


def adapted(model: nn.Module, x: Tensor, config: lc.LoraConfig, folder: Path) -> list[Tensor]:
    """What is computed on the way from a plain model to an adapted, trained, merged, saved and loaded one."""
    device = x.device
    lc.add_adapter(model, config)
    # there is one set of biases, which one adapter trains, and of a module trained whole one copy runs
    lc.add_adapter(model, dataclasses.replace(config, bias="none", modules_to_save=None), adapter_name="second")
    randomise(model, 0.1)
    values = step(model, x)
    assert {p.device for p in (*model.parameters(), *model.buffers())} == {device}
    lc.set_adapter(model, ["default", "second"])
    model.eval()
    with torch.no_grad():
        values.append(model(x).cpu())
        lc.set_adapter(model, "default")
        before = model(x)
        lc.save_adapter(model, folder)
        lc.merge_adapter(model)
        values.append(model(x).cpu())
        lc.unmerge_adapter(model)
        assert torch.equal(model(x).cpu(), before.cpu())
        for name in ("second", "default"):
            lc.delete_adapter(model, name)
        lc.load_adapter(model, folder, adapter_name="loaded")
        lc.set_adapter(model, "loaded")
        # a start out of the base's weight is saved as a plain adapter of twice the rank, whose sums round anew
        exact = {"rtol": 0, "atol": 0} if config.init_lora_weights in (True, "gaussian") else {}
        torch.testing.assert_close(model(x).cpu(), before.cpu(), **exact)
        with lc.disable_adapter(model):
            values.append(model(x).cpu())
        values.append(lc.merge_and_unload(model)(x).cpu())
    return values


def same_as_on_the_cpu(model: nn.Module, x: Tensor, config: lc.LoraConfig, folder: Path) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(0)
    here = adapted(model, x, config, folder / "here")
    fresh = type(model)()
    fresh.load_state_dict(state)
    torch.manual_seed(0)
    there = adapted(fresh.to(DEVICE), x.to(DEVICE), config, folder / "there")
    for ours, theirs in zip(there, here, strict=True):
        torch.testing.assert_close(ours, theirs)


def adapters(folder: Path) -> None:
    wide = {"r": 3, "lora_alpha": 6, "modules_to_save": ["lm_head"], "bias": "all"}
    for start in (True, "gaussian", "pissa", "pissa_niter_4", "olora"):
        config = lc.LoraConfig(target_modules="all-linear", init_lora_weights=start, **wide)
        same_as_on_the_cpu(TinyDecoder(), tokens(), config, folder / str(start))
    every = lc.LoraConfig(r=3, target_modules=["embed", "conv1d", "conv2d", "out"])
    same_as_on_the_cpu(Mixed(), torch.arange(8).view(1, 8), every, folder / "mixed")


def test_other_device_takes_adapters_of_every_kind(tmp_path):
    apart(adapters, tmp_path)


def a_quantised_transformer(folder: Path) -> None:
    """QLoRA with dropout, activations recomputed in the backward, and fused layers."""
    model = transformers_model(TINY).to(DEVICE)
    lc.quantize_model(model, lc.NF4Config(double_quant=True))
    lc.add_adapter(model, lc.LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear"))
    randomise(model, 0.1)
    report = lc.fuse(model)
    assert len(report.swapped) == 7 * TINY.layers and report.shared
    recompute_activations(model)
    x = tokens(vocabulary=TINY.vocabulary).to(DEVICE)
    loss = model(input_ids=x, labels=x).loss
    loss.backward()
    assert launched["nf4_quantize"] == 7 * TINY.layers
    assert {p.grad.device.type for p in model.parameters() if p.requires_grad} == {torch.device(DEVICE).type}
    lc.save_adapter(model, folder)


def test_other_device_trains_a_quantised_transformer(tmp_path):
    apart(a_quantised_transformer, tmp_path)


def the_doctor(folder: Path) -> None:
    """Each operation, in single elements and in whole tiles, with a few tokens and with many."""
    from lora_core import doctor

    checks = doctor.self_check(DEVICE)
    failures = [f"{c.operation}: {c.detail}" for c in checks if not c.passed]
    assert not failures, failures
    ways = {path for c in checks for path in c.paths}
    for name, kinds in (("nf4_quantize", ("bytes", "words")), ("nf4_dequantize", ("bytes", "words"))):
        assert all(any(way.startswith(name) and kind in way for way in ways) for kind in kinds), ways
    assert any("in panels" in way for way in ways) and any("decoded in the product" in way for way in ways)
    assert {way for way in ways if way.startswith("low_rank_matmul")} == {
        f"low_rank_matmul: loads of {size}" for size in ("16 bytes", "single elements")
    }


def test_other_device_is_examined_in_every_form_of_the_kernels(tmp_path):
    apart(the_doctor, tmp_path)


if __name__ == "__main__":
    run_named(globals())
