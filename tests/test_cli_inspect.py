"""`lora-core inspect` on sound, untrained, damaged, mixed-up and foreign checkpoints."""

import json
import math
import os
import pickle
import re
import subprocess
import sys

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


def exit_status(*arguments):
    """The program's exit status for these arguments."""
    try:
        main([*arguments])
    except SystemExit as stop:
        return stop.code
    return 0


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
    assert exit_status("inspect", str(tmp_path / "fresh")) == 1
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


def test_inspect_reports_values_that_are_not_finite(tmp_path):
    write_adapter(tmp_path, up__lora_A=torch.full((4, 16), math.nan))
    report = inspect_path(tmp_path)
    assert any("NaN or infinity" in p for p in report.problems)


def test_inspect_json_is_json_even_with_a_nan(tmp_path, capsys):
    write_adapter(tmp_path, up__lora_A=torch.full((4, 16), math.nan))
    assert exit_status("inspect", str(tmp_path), "--json") == 1
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
    assert any(re.search(r"layer\.weight\.absmax .*has 3 elements", p) for p in inspect_path(path).problems)
    quantised_file(path, weight__absmax=None)
    assert any("layer.weight.absmax is missing" in p for p in inspect_path(path).problems)


def test_inspect_reports_packed_bytes_cast_to_floats(tmp_path):
    path = tmp_path / "model.safetensors"
    codes = torch.zeros((48 * 67 + 1) // 2, 1, dtype=torch.bfloat16)
    quantised_file(path, weight=codes)
    assert any("layer.weight" in p and "has 3216 elements, want 1608" in p for p in inspect_path(path).problems)


def test_inspect_reads_packed_bytes_kept_in_another_dtype(tmp_path):
    """bitsandbytes' quant_storage: the same bytes, named as bfloat16."""
    path = tmp_path / "model.safetensors"
    packed = lc.quantize_nf4(torch.randn(48, 67)).to_bitsandbytes(prefix="weight")["weight"]
    quantised_file(path, weight=packed.view(-1).view(torch.bfloat16)[:, None])
    report = inspect_path(path)
    assert report.problems == [] and report.quantised[0].shape == (48, 67)


def about(changes):
    """A quant_state as a file holds it, with some of its values changed, or the text itself."""
    value = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [48, 67]}
    value |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
    text = changes if isinstance(changes, str) else json.dumps(value | changes)
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


STATE = "weight__quant_state__bitsandbytes__nf4"


@pytest.mark.parametrize(
    "changes",
    [
        *({"blocksize": value} for value in (0, "64x", None, -64, 1e300)),
        *({"nested_blocksize": value} for value in (0, None, "x")),
        *({"shape": value} for value in ("ab", None, {"a": 1}, [math.inf, 2], [1e300, 1e300], [64.7, 128], [3, 3])),
        *({"quant_type": value} for value in ("int3", None, [])),
        *({"dtype": value} for value in ("wat", None, "Tensor")),
        {"nested_offset": "x"},
        "[" * 100_000,
        '{"quant_type": "nf4"',
        "null",
    ],
)
def test_inspect_reports_a_damaged_quantised_weight(tmp_path, changes):
    path = tmp_path / "model.safetensors"
    weight = lc.quantize_nf4(torch.randn(48, 67))
    state = {f"layer.{k}": v for k, v in weight.to_bitsandbytes(prefix="weight").items()}
    state["layer.weight.quant_state.bitsandbytes__nf4"] = about(changes)
    save_file(state, path)
    report = inspect_path(path)
    assert len(report.problems) == 1 and "layer.weight" in report.problems[0] and report.quantised == []
    assert exit_status("inspect", str(path)) == 1


@pytest.mark.parametrize("part", ["quant_map", "nested_quant_map", "quant_state.bitsandbytes__nf4", "absmax"])
def test_inspect_reports_a_part_of_a_quantised_weight_that_is_missing(tmp_path, part):
    path = tmp_path / "model.safetensors"
    state = lc.quantize_nf4(torch.randn(48, 67)).to_bitsandbytes(prefix="weight")
    del state[f"weight.{part}"]
    save_file(state, path)
    (problem,) = inspect_path(path).problems
    assert part in problem


def test_inspect_reads_the_weights_of_a_model_that_is_not_bitsandbytes(tmp_path):
    held = nn.ModuleDict({"a": lc.quant.quantize(torch.randn(8, 64), quant_type="int4")})
    save_file(held.state_dict(), tmp_path / "model.safetensors")
    report = inspect_path(tmp_path)
    assert (report.problems, report.plain) == ([], [])
    assert (report.quantised[0].name, report.quantised[0].quant_type) == ("a", "int4")


def shards(folder, index):
    save_file({"a": torch.ones(2)}, folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(index if isinstance(index, str) else json.dumps(index))
    return inspect_path(folder).problems


ONE, TWO = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))


def test_inspect_follows_the_index_of_a_sharded_model(tmp_path):
    assert shards(tmp_path, {"weight_map": {"a": ONE}}) == []


@pytest.mark.parametrize(
    ("index", "told"),
    [
        ({"weight_map": {"a": ONE, "b": TWO}}, f"names {TWO}, not in the folder"),
        ({"weight_map": {"a": ONE, "b": ONE}}, "places b in a file without it"),
        ({"weight_map": {"a": 3}}, "has no weight_map"),
        ({"weight_map": []}, "has no weight_map"),
        ({}, "has no weight_map"),
        ("{", "is no JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "holds a list"),
    ],
)
def test_inspect_reports_an_index_that_cannot_be_followed(tmp_path, index, told):
    (problem,) = shards(tmp_path, index)
    assert told in problem


def test_inspect_reports_a_file_without_tensors(tmp_path):
    save_file({}, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps(CONFIGURATION))
    assert any("there is no tensor in it" in p for p in inspect_path(tmp_path).problems)


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


A, B = torch.full((4, 16), 0.5), torch.full((24, 4), 2.0)


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


def test_inspect_says_where_a_link_leads_nowhere(tmp_path):
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(CheckpointError, match="model.safetensors"):
            inspect_path(path)


@pytest.mark.parametrize("name", [CONFIG, "model.safetensors.index.json"])
def test_inspect_of_a_json_file_asks_for_its_folder(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match="holds no tensors; want the folder that it lies in"):
        inspect_path(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_inspect_waits_for_no_pipe_in_a_folder(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    command = [sys.executable, "-m", "lora_core", "inspect", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "has no safetensors file" in done.stderr


def test_inspect_refuses_what_is_neither_file_nor_folder(tmp_path):
    with pytest.raises(CheckpointError, match="neither a file nor a folder"):
        inspect_path(os.devnull)


@pytest.mark.parametrize("what", ["", WEIGHTS, CONFIG])
def test_inspect_says_that_permission_is_denied(tmp_path, what, unreadable):
    write_adapter(tmp_path)
    unreadable(tmp_path / what)
    with pytest.raises(CheckpointError, match="permission denied"):
        inspect_path(tmp_path)


@pytest.mark.parametrize("columns", ["40", "120"])
def test_inspect_lets_no_file_steer_the_terminal(tmp_path, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    harm = "\x1b]0;x\x07\x9b2J\ud800\r"
    write_adapter(tmp_path, {**CONFIGURATION, "task_type": None, "base_model_name_or_path": harm, harm: harm})
    save_file({f"base_model.model.{harm[:6]}.lora_A.weight": A, "x\x1b[2J": B}, tmp_path / WEIGHTS)
    assert exit_status("inspect", str(tmp_path)) == 1
    shown = capsys.readouterr().out
    assert r"\x1b]0;x\x07\x9b2J\ud800\r" in "".join(shown.split())
    assert all(c.isprintable() or c == "\n" for c in shown)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": harm}))
    exit_status("inspect", str(tmp_path))
    assert all(c.isprintable() or c == "\n" for c in "".join(capsys.readouterr()))


def test_inspect_calls_nothing_a_pickle_that_does_not_look_like_one(tmp_path):
    (tmp_path / "rand.bin").write_bytes(b"\x11\x22\x33 random")
    with pytest.raises(CheckpointError, match="by its name a pickle"):
        inspect_path(tmp_path / "rand.bin")


def test_program_ends_with_a_line_where_its_output_is_full(tmp_path):
    write_adapter(tmp_path)
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "lora_core", "inspect", str(tmp_path)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "lora-core: no space left on device\n")


def test_program_interrupted_while_it_loads_ends_with_a_line(monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_core.cli.importlib.import_module", interrupted)
    assert exit_status("memory") == 130
    assert capsys.readouterr().err == "lora-core: interrupted\n"


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


def test_inspect_adapter_of_whole_modules_alone_is_sound(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    lc.add_adapter(model, lc.LoraConfig(modules_to_save=["1"]))
    lc.save_adapter(model, tmp_path)
    assert inspect_path(tmp_path).problems == []
