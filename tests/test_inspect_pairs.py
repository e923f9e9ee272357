"""What an inspection says of an adapter's pairs and settings, and where the two disagree."""

import json
import math

import pytest
import torch
from inspected import CONFIGURATION, exit_status, write_adapter
from safetensors.torch import load_file, save_file
from torch import nn

import lora_core as lc
from lora_core.adapt.files import CONFIG, METADATA_KEY, WEIGHTS
from lora_core.adapt.save import save_adapter
from lora_core.errors import CheckpointError
from lora_core.inspect.adapter import update_norm
from lora_core.inspect.path import inspect_path

A, B = torch.full((4, 16), 0.5), torch.full((24, 4), 2.0)


def test_inspect_reads_a_sound_adapter(tmp_path):
    tensors = write_adapter(tmp_path / "a")
    report = inspect_path(tmp_path / "a")
    assert (report.kind, report.problems, report.notes, report.plain) == ("adapter", [], [], [])
    assert report.settings["method"] == "LoRA"
    assert report.settings["scaling"] == 2.0
    down, up = report.pairs
    assert (up.module, up.rank, up.scaling, up.shape_a, up.shape_b) == ("up", 4, 2.0, (4, 16), (24, 4))
    product = tensors["base_model.model.down.lora_B.weight"] @ tensors["base_model.model.down.lora_A.weight"]
    assert down.update_norm == pytest.approx(2 * product.double().norm().item(), rel=1e-5)
    assert not up.untrained


def test_inspect_norm_of_the_product_needs_no_product():
    a, b = torch.randn(3, 50, dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64)
    assert math.isclose(update_norm(a, b), (b @ a).norm().item(), rel_tol=1e-12)
    assert update_norm(a, b * 0) == 0


def test_inspect_norm_of_a_rank_far_above_the_sides_takes_no_memory_of_its_square():
    a, b = torch.randn(200_000, 1), torch.randn(1, 200_000)
    assert math.isclose(update_norm(a, b), abs((b.double() @ a.double()).item()), rel_tol=1e-12)


def test_inspect_says_where_a_file_holds_two_adapters(tmp_path):
    """As load_adapter does; the same tensor under both names is no problem."""
    pair = {"up__lora_A": None, "up__lora_B__one": torch.randn(24, 4), "up__lora_A__one": A, "up__lora_B": None}
    write_adapter(tmp_path, **pair, up__lora_A__two=A.clone())
    assert inspect_path(tmp_path).problems == []
    write_adapter(tmp_path, **pair, up__lora_A__two=A + 1)
    (problem,) = inspect_path(tmp_path).problems
    assert "two different tensors of one name" in problem and "up.lora_A.two.weight" in problem
    for one, two in ((torch.float8_e4m3fn, torch.float8_e5m2), (torch.float32, torch.float16)):
        halves = pair | {"up__lora_A__one": A.to(one)}
        write_adapter(tmp_path, **halves, up__lora_A__two=A.to(two))
        assert inspect_path(tmp_path).problems == []


@pytest.mark.parametrize(
    ("names", "word"),
    [
        (("lora_unet_up.lora_down.weight", "lora_unet_up.lora_up.weight"), "The names are kohya's"),
        (("unet.up.lora.down.weight", "unet.up.lora.up.weight"), "diffusers'"),
        (("up.lora_a", "up.lora_b"), "MLX's or torchtune's"),
        (("unet.up.lora_A.weight", "unet.up.lora_B.weight"), "without 'base_model.model.' in front"),
        (("base_model.model.up.weight", "base_model.model.down.weight"), "there is no pair"),
    ],
)
def test_names_of_other_tools_are_said_to_be_theirs(tmp_path, names, word):
    """By the inspection, and by loading, which refuses them."""
    pair = dict(zip(names, (torch.randn(4, 16), torch.randn(24, 4)), strict=True))
    (tmp_path / CONFIG).write_text(json.dumps(CONFIGURATION))
    save_file(pair, tmp_path / WEIGHTS)
    assert any(word in problem for problem in inspect_path(tmp_path).problems)
    assert exit_status("inspect", str(tmp_path)) == 1
    model = nn.ModuleDict({"up": nn.Linear(16, 24), "down": nn.Linear(24, 16)})
    with pytest.raises(CheckpointError, match="Want the base model" if "pair" in word else word):
        lc.load_adapter(model, tmp_path)


def test_inspect_names_the_single_layer_that_was_never_trained(tmp_path):
    write_adapter(tmp_path, up__lora_B=torch.zeros(24, 4))
    report = inspect_path(tmp_path)
    assert report.problems == []
    assert report.notes == ["never trained, B A is zero: up"]


def test_inspect_scaling_follows_rslora_and_patterns(tmp_path):
    config = {**CONFIGURATION, "use_rslora": True, "alpha_pattern": {"down": 6}, "rank_pattern": {"down": 9}}
    wide = {"down__lora_A": torch.randn(9, 24), "down__lora_B": torch.randn(16, 9)}
    write_adapter(tmp_path, config, **wide)
    report = inspect_path(tmp_path)
    assert report.settings["method"] == "rsLoRA"
    assert {p.module: p.scaling for p in report.pairs} == {"up": 4.0, "down": 2.0}
    assert report.problems == []


def test_inspect_reports_a_rank_the_configuration_denies(tmp_path):
    write_adapter(tmp_path, {**CONFIGURATION, "r": 8})
    assert any("the configuration says rank 8, A has 4 rows" in p for p in inspect_path(tmp_path).problems)


def test_inspect_lists_unknown_fields_with_the_nearest_known(tmp_path):
    write_adapter(tmp_path, {**CONFIGURATION, "lora_dropuot": 0.5, "shiny": 1})
    notes = inspect_path(tmp_path).notes
    assert any("lora_dropuot" in n and "did you mean lora_dropout" in n for n in notes)
    assert any("shiny = 1" in n for n in notes)


def test_inspect_leaves_the_fields_of_another_method_alone(tmp_path):
    write_adapter(tmp_path, {**CONFIGURATION, "peft_type": "VERA", "init_weights": True})
    report = inspect_path(tmp_path)
    assert any("peft_type 'VERA'" in p for p in report.problems) and not any("init_weights" in n for n in report.notes)


def test_inspect_reports_metadata_of_another_generation(tmp_path):
    other = json.dumps({**CONFIGURATION, "lora_alpha": 16})
    write_adapter(tmp_path, metadata={METADATA_KEY: other})
    assert any("differ in lora_alpha: 8 and 16" in p for p in inspect_path(tmp_path).problems)


def test_inspect_uses_the_configuration_inside_the_weights(tmp_path):
    write_adapter(tmp_path, config=None, metadata={METADATA_KEY: json.dumps(CONFIGURATION)})
    report = inspect_path(tmp_path)
    assert report.settings["r"] == 4
    assert report.problems == []


def test_inspect_reports_a_missing_configuration_and_a_missing_half(tmp_path):
    write_adapter(tmp_path, config=None, up__lora_B=None)
    problems = " ".join(inspect_path(tmp_path).problems)
    assert "alpha and targets are unknown" in problems
    assert "no base_model.model.up.lora_B.weight beside it" in problems


def test_inspect_reports_a_half_without_its_a(tmp_path):
    write_adapter(tmp_path, up__lora_A=None)
    assert any("up.lora_B.weight has no A" in p for p in inspect_path(tmp_path).problems)


def test_inspect_reports_what_cannot_be_loaded(tmp_path):
    write_adapter(tmp_path, {**CONFIGURATION, "use_qalora": True})
    assert any("use_qalora" in p for p in inspect_path(tmp_path).problems)


def test_inspect_norm_of_an_update_that_is_subtracted_is_no_less(tmp_path):
    write_adapter(tmp_path)
    added = inspect_path(tmp_path).pairs
    (tmp_path / CONFIG).write_text(json.dumps({**CONFIGURATION, "lora_alpha": -CONFIGURATION["lora_alpha"]}))
    assert [p.update_norm for p in inspect_path(tmp_path).pairs] == [p.update_norm for p in added]


@pytest.mark.parametrize("b", [torch.ones(24, 4), torch.zeros(24, 4)], ids=["trained", "zero"])
def test_inspect_reports_values_that_are_not_finite(tmp_path, b):
    write_adapter(tmp_path, up__lora_A=torch.full((4, 16), math.nan), up__lora_B=b)
    report = inspect_path(tmp_path)
    assert any("NaN or infinity" in p for p in report.problems)
    # 0 times NaN is not 0
    assert not any(pair.untrained for pair in report.pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn])
def test_inspect_reports_other_tensors_of_an_adapter_that_are_no_numbers(tmp_path, dtype):
    bias = torch.tensor([1.0, math.nan]).to(dtype)
    write_adapter(tmp_path, head=bias, tail=torch.ones(2), counts=torch.ones(2, dtype=torch.int64))
    (problem,) = inspect_path(tmp_path).problems
    assert problem.startswith("base_model.model.head.weight holds NaN or infinity")


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64, torch.int32])
def test_inspect_reports_a_pair_that_is_not_of_floating_numbers(tmp_path, dtype):
    write_adapter(tmp_path, up__lora_A=torch.ones(4, 16, dtype=dtype))
    assert any("want floating numbers" in p and "up: A is" in p for p in inspect_path(tmp_path).problems)


def test_inspect_reads_a_pair_of_eight_bit_floats(tmp_path):
    narrow = torch.float8_e4m3fn
    changes = {name: tensor.to(narrow) for name, tensor in (("up__lora_A", A), ("up__lora_B", B))}
    write_adapter(tmp_path, **changes)
    report = inspect_path(tmp_path)
    assert report.problems == [] and report.pairs[1].dtype == "float8_e4m3fn"
    assert report.pairs[1].update_norm == pytest.approx(2 * (B @ A).norm().item())


@pytest.mark.parametrize("targets", [None, {"up": 1}, [], "", 7])
def test_inspect_reports_targets_that_are_no_names(tmp_path, targets):
    write_adapter(tmp_path, {**CONFIGURATION, "target_modules": targets})
    assert any("target_modules" in p and "want" in p for p in inspect_path(tmp_path).problems)


@pytest.mark.parametrize("changes", [{"lora_alpha": 10**400}, {"r": 10**400}, {"alpha_pattern": {"up": 10**400}}])
def test_inspect_reports_a_number_beyond_all_floats(tmp_path, changes):
    write_adapter(tmp_path, {**CONFIGURATION, **changes})
    assert inspect_path(tmp_path).problems != []
    assert exit_status("inspect", str(tmp_path)) == exit_status("inspect", str(tmp_path), "--json") == 1


@pytest.mark.parametrize("depth", [100, 900, 100_000])
def test_inspect_refuses_a_configuration_that_is_nested_too_deeply(tmp_path, depth):
    write_adapter(tmp_path)
    (tmp_path / CONFIG).write_text('{"r": ' + "[" * depth + "]" * depth + "}")
    with pytest.raises(CheckpointError, match="nested too deeply"):
        inspect_path(tmp_path)


def test_inspect_refuses_a_configuration_that_is_no_json(tmp_path):
    write_adapter(tmp_path)
    (tmp_path / CONFIG).write_text('{"r": 4')
    with pytest.raises(CheckpointError, match="no JSON"):
        inspect_path(tmp_path)


def test_inspect_reads_what_save_adapter_wrote(tmp_path):
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 5), nn.Conv1d(5, 3, 2))
    lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["0", "1", "2"], init_lora_weights=False))
    save_adapter(model, tmp_path)
    report = inspect_path(tmp_path)
    assert report.problems == report.notes == report.plain == []
    assert [p.module for p in report.pairs] == ["0", "1", "2"]
    assert set(load_file(tmp_path / WEIGHTS)) == {
        f"base_model.model.{n}"
        for n in (
            "0.lora_embedding_A",
            "0.lora_embedding_B",
            "1.lora_A.weight",
            "1.lora_B.weight",
            "2.lora_A.weight",
            "2.lora_B.weight",
        )
    }
    # an embedding's A^T is looked up: the product is B A all the same
    layer = model[0]
    delta = layer.delta("default").double().norm().item()
    assert report.pairs[0].update_norm == pytest.approx(delta, rel=1e-5)


def test_inspect_adapter_of_whole_modules_alone_is_sound(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    lc.add_adapter(model, lc.LoraConfig(modules_to_save=["1"]))
    lc.save_adapter(model, tmp_path)
    assert inspect_path(tmp_path).problems == []
