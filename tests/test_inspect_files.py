"""What can be opened for inspection: files, shards, links, and what is refused."""

import io
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from inspected import CONFIGURATION, write_adapter
from safetensors.torch import load_file, save_file

from lora_core.adapt.files import CONFIG, WEIGHTS
from lora_core.errors import CheckpointError
from lora_core.inspect.path import inspect_path


def test_inspect_reads_a_folder_of_shards(tmp_path):
    save_file({"norm.weight": torch.ones(3)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"head.weight": torch.ones(3, 2)}, tmp_path / "model-00002-of-00002.safetensors")
    report = inspect_path(tmp_path)
    assert len(report.files) == 2
    assert [t.name for t in report.plain] == ["head.weight", "norm.weight"]


def test_inspect_reads_a_file_whose_length_looks_like_the_start_of_a_pickle(tmp_path):
    path, name = tmp_path / "a.safetensors", "a"
    while not path.exists() or not path.read_bytes().startswith(b"\x80\x02"):
        save_file({name: torch.ones(2)}, path)
        name += "a"
        assert len(name) < 1000
    assert [t.shape for t in inspect_path(path).plain] == [(2,)]


def test_inspect_of_a_file_leaves_the_configuration_of_an_adapter_beside_it_alone(tmp_path):
    write_adapter(tmp_path)
    save_file({"norm.weight": torch.ones(3)}, tmp_path / "other.safetensors")
    report = inspect_path(tmp_path / "other.safetensors")
    assert (report.kind, report.problems, [t.name for t in report.plain]) == ("checkpoint", [], ["norm.weight"])


def test_inspect_leaves_an_index_beside_a_model_in_one_file_alone(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": ONE}}))
    report = inspect_path(tmp_path)
    assert report.problems == [] and list(report.files) == ["model.safetensors"]


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


def test_inspect_calls_nothing_a_pickle_that_does_not_look_like_one(tmp_path):
    (tmp_path / "rand.bin").write_bytes(b"\x11\x22\x33 random")
    with pytest.raises(CheckpointError, match="by its name a pickle"):
        inspect_path(tmp_path / "rand.bin")


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


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("adapter_model.bin", "adapter_model.safetensors"),
        ("pytorch_model.bin", "model.safetensors"),
        ("renamed.safetensors", "model.safetensors"),
    ],
)
def test_inspect_says_how_a_pickle_becomes_what_is_read(tmp_path, name, wanted):
    write_adapter(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "weights")
    torch.save(load_file(tmp_path / "weights"), tmp_path / name)
    with pytest.raises(CheckpointError, match=f"torch.load.*'{wanted}'.*in the same folder"):
        inspect_path(tmp_path / name)
    save_file(torch.load(io.BytesIO((tmp_path / name).read_bytes()), weights_only=True), tmp_path / wanted)
    assert inspect_path(tmp_path / wanted).pairs and (wanted != WEIGHTS or not inspect_path(tmp_path).problems)


def test_inspect_of_an_adapter_without_weights_wants_them_by_their_name(tmp_path):
    write_adapter(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"has no {WEIGHTS} beside its {CONFIG}"):
        inspect_path(tmp_path)


def test_inspect_refuses_a_folder_of_pickles(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin is a pickle"):
        inspect_path(tmp_path)


def test_inspect_says_that_a_path_does_not_exist(tmp_path):
    with pytest.raises(CheckpointError, match="there is no .*gone; want an adapter's folder"):
        inspect_path(tmp_path / "gone")


def test_inspect_refuses_a_tensor_that_two_files_hold(tmp_path):
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        save_file({"weight": torch.ones(2)}, tmp_path / name)
    with pytest.raises(CheckpointError, match="00002-of-00002.* holds weight, which another file of the folder holds"):
        inspect_path(tmp_path)


def test_inspect_names_an_adapter_with_magnitudes_dora(tmp_path):
    write_adapter(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({**tensors, "base_model.model.up.lora_magnitude_vector": torch.ones(24)}, tmp_path / WEIGHTS)
    assert inspect_path(tmp_path).settings["method"] == "DoRA"
