"""`lora-core inspect` on sound, untrained, damaged, mixed-up and foreign checkpoints."""

import json
import math
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora_core as lc
from lora_core.adapt.files import CONFIG, METADATA_KEY, WEIGHTS
from lora_core.adapt.save import save_adapter
from lora_core.cli import main
from lora_core.errors import CheckpointError
from lora_core.inspect.adapter import update_norm
from lora_core.inspect.path import inspect_path

CONFIGURATION = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["up", "down"], "bias": "none"}


def write_adapter(folder, config=CONFIGURATION, metadata=None, **changes):
    """Write a trained adapter for two layers, 16 -> 24 and 24 -> 16, with some tensors changed or (None) left out."""
    tensors = {
        "base_model.model.up.lora_A.weight": torch.randn(4, 16),
        "base_model.model.up.lora_B.weight": torch.randn(24, 4),
        "base_model.model.down.lora_A.weight": torch.randn(4, 24),
        "base_model.model.down.lora_B.weight": torch.randn(16, 4),
    }
    tensors.update({f"base_model.model.{k.replace('__', '.')}.weight": v for k, v in changes.items()})
    folder.mkdir(exist_ok=True)
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / WEIGHTS, metadata=metadata)
    if config is not None:
        (folder / CONFIG).write_text(json.dumps(config))
    return tensors


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


def test_inspect_says_that_an_adapter_was_never_trained(tmp_path, capsys):
    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16))
    lc.add_adapter(model, lc.LoraConfig(r=4, target_modules=["0"]))
    save_adapter(model, tmp_path / "fresh")
    main(["inspect", str(tmp_path / "fresh")])
    assert "adapter never trained" in capsys.readouterr().out


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


def test_inspect_reports_values_that_are_not_finite(tmp_path):
    write_adapter(tmp_path, up__lora_A=torch.full((4, 16), math.nan))
    report = inspect_path(tmp_path)
    assert any("NaN or infinity" in p for p in report.problems)


def test_inspect_json_is_json_even_with_a_nan(tmp_path, capsys):
    write_adapter(tmp_path, up__lora_A=torch.full((4, 16), math.nan))
    main(["inspect", str(tmp_path), "--json"])
    values = json.loads(capsys.readouterr().out)
    assert values["kind"] == "adapter"
    assert {p["module"]: p["update_norm"] for p in values["pairs"]}["up"] is None


def quantised_file(path, double_quant=True, **changes):
    weight = lc.quantize_nf4(torch.randn(48, 67), double_quant=double_quant)
    state = {f"layer.{k}": v for k, v in weight.to_bitsandbytes(prefix="weight").items()}
    state["norm.weight"] = torch.ones(67)
    state.update({f"layer.{k.replace('__', '.')}": v for k, v in changes.items()})
    save_file({k: v.contiguous() for k, v in state.items() if v is not None}, path)
    return weight


@pytest.mark.parametrize("double_quant", [True, False])
def test_inspect_reads_a_quantised_checkpoint(tmp_path, double_quant, capsys):
    path = tmp_path / "model.safetensors"
    weight = quantised_file(path, double_quant)
    report = inspect_path(path)
    assert (report.kind, report.problems) == ("checkpoint", [])
    (found,) = report.quantised
    assert (found.name, found.quant_type, found.shape, found.block_size) == ("layer.weight", "nf4", (48, 67), 64)
    assert found.double_quant is double_quant
    blocks = math.ceil(48 * 67 / 64)
    scales = blocks + 4 * math.ceil(blocks / 256) if double_quant else 4 * blocks
    assert found.bits_per_parameter == 8 * (48 * 67 / 2 + scales) / (48 * 67)
    assert found.bits_per_parameter == pytest.approx(weight.bits_per_parameter, rel=0.01)
    assert [t.name for t in report.plain] == ["norm.weight"]
    main(["inspect", str(path)])
    assert "no problems found" in capsys.readouterr().out


def test_inspect_reads_a_folder_of_shards(tmp_path):
    quantised_file(tmp_path / "model-00001-of-00002.safetensors")
    save_file({"head.weight": torch.ones(3, 2)}, tmp_path / "model-00002-of-00002.safetensors")
    report = inspect_path(tmp_path)
    assert len(report.files) == 2
    assert [t.name for t in report.plain] == ["head.weight", "norm.weight"]


def test_inspect_reports_a_quantised_weight_that_does_not_add_up(tmp_path):
    path = tmp_path / "model.safetensors"
    quantised_file(path, weight__absmax=torch.zeros(3, dtype=torch.uint8))
    assert any("layer.weight.absmax has 3 elements" in p for p in inspect_path(path).problems)
    quantised_file(path, weight__absmax=None)
    assert any("layer.weight.absmax is missing" in p for p in inspect_path(path).problems)


def test_inspect_reports_packed_bytes_stored_as_floats(tmp_path):
    path = tmp_path / "model.safetensors"
    codes = torch.zeros((48 * 67 + 1) // 2, 1, dtype=torch.bfloat16)
    quantised_file(path, weight=codes)
    assert any("stored as bfloat16" in p for p in inspect_path(path).problems)


def test_inspect_refuses_a_truncated_file(tmp_path):
    write_adapter(tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="truncated or foreign.*save it again"):
        inspect_path(tmp_path)


@pytest.mark.parametrize("name", ["adapter_model.bin", "model.pt", "renamed.safetensors"])
def test_inspect_never_opens_a_pickle(tmp_path, name):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match="pickle.*Convert it where you trust it"):
        inspect_path(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def test_inspect_refuses_a_folder_of_pickles(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin is a pickle"):
        inspect_path(tmp_path)


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("hello")])
def test_inspect_says_what_it_wants_instead(tmp_path, make, capsys):
    path = tmp_path / "thing"
    make(path)
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(path)])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "CheckpointError" in message
    assert "thing" in message


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
