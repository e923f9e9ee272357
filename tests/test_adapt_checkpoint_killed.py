"""Two files, one generation: edited, half written, and written by a process killed at any moment."""

import json
import os
import shutil
import subprocess
import sys
import time
import warnings

import pytest
import torch
from checkpoints import (
    CONFIG,
    WEIGHTS,
    adapted,
    assert_refused,
    decoder,
    read,
    saved,
)
from models import tokens
from safetensors.torch import load_file, save_file

import lora_core as lc
from lora_core.adapt import files, read_files, write_files
from lora_core.adapt.walk import adapter_layers


@pytest.fixture
def folder(tmp_path):
    return saved(tmp_path)


def test_checkpoint_files_of_two_generations_are_refused(folder, tmp_path):
    lc.save_adapter(adapted(decoder(), target_modules=["q_proj", "v_proj"], lora_alpha=99), tmp_path / "new")
    shutil.copy(tmp_path / "new" / CONFIG, folder / CONFIG)
    assert_refused(folder, "not of one generation", "lora_alpha is 99", "saved with 6", f"remove {CONFIG}")
    (folder / CONFIG).unlink()
    assert adapter_layers(lc.load_adapter(decoder(), folder))["layers.0.attn.q_proj"].adapters["default"].scaling == 1.5


def test_checkpoint_configuration_may_be_edited_where_that_changes_nothing(folder, tmp_path):
    values = read(folder)
    values["base_model_name_or_path"] = "somewhere/else"
    values["lora_dropout"] = 0.5
    del values["use_rslora"]
    (folder / CONFIG).write_text(json.dumps(values))
    model = lc.load_adapter(decoder(), folder)
    assert adapter_layers(model)["layers.0.attn.q_proj"].adapters["default"].dropout == 0.5


def test_checkpoint_configuration_that_is_edited_to_what_is_not_implemented_is_refused_as_such(folder):
    (folder / CONFIG).write_text(json.dumps({**read(folder), "use_dora": True}))
    assert_refused(folder, "sets use_dora to True", error=lc.ConfigError)


def test_checkpoint_failed_write_leaves_the_old_one_and_no_litter(folder, monkeypatch):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write_files, "_sync", full)
    with pytest.raises(lc.CheckpointError, match="No space left.*what was there is whole.*make room"):
        lc.save_adapter(adapted(decoder(), target_modules=["up_proj"]), folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize("failure", [OSError(1, "Operation not permitted"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("before", ["own", "foreign", "nothing"])
def test_checkpoint_whose_second_rename_fails_leaves_what_was_there(folder, tmp_path, monkeypatch, before, failure):
    """New configuration beside old weights would load as neither, or, where these carry none, silently as both."""
    if before == "foreign":
        save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"format": "pt"})
    elif before == "nothing":
        folder = tmp_path / "empty"
        folder.mkdir()
    there = {p.name: p.read_bytes() for p in folder.iterdir()}
    replace = os.replace

    def fails_at_weights(old, new):
        if str(new).endswith(WEIGHTS):
            raise failure
        replace(old, new)

    monkeypatch.setattr(os, "replace", fails_at_weights)
    with pytest.raises((lc.CheckpointError, KeyboardInterrupt)):
        lc.save_adapter(adapted(decoder(), target_modules=["up_proj"], lora_alpha=99), folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == there


@pytest.mark.parametrize("weights", ["own", "foreign"])
def test_checkpoint_whose_configuration_cannot_be_put_back_is_read_as_after_a_kill(folder, monkeypatch, weights):
    if weights == "foreign":
        save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"format": "pt"})
    wanted = lc.load_adapter(decoder(), folder)(tokens())
    replace, calls = os.replace, []

    def fails_from_the_second_on(old, new):
        calls.append(new)
        if len(calls) > 1:
            raise OSError(1, "Operation not permitted")
        replace(old, new)

    monkeypatch.setattr(os, "replace", fails_from_the_second_on)
    with pytest.raises(lc.CheckpointError, match="Operation not permitted"):
        lc.save_adapter(adapted(decoder(), target_modules=["up_proj"], lora_alpha=99), folder)
    assert read(folder)["lora_alpha"] == 99
    with pytest.warns(UserWarning, match="interrupted.*the checkpoint before it"):
        loaded = lc.load_adapter(decoder(), folder)
    assert torch.equal(loaded(tokens()), wanted)


@pytest.mark.parametrize("kept", [None, {"lora_alpha": 7}], ids=["none kept", "edited before"])
def test_checkpoint_whose_weights_hold_their_configuration_is_read_by_no_other_after_a_kill(folder, tmp_path, kept):
    wanted, values = lc.load_adapter(decoder(), folder)(tokens()), read(folder)
    lc.save_adapter(adapted(decoder(), target_modules=["up_proj"], lora_alpha=99), tmp_path / "new")
    shutil.copy(tmp_path / "new" / WEIGHTS, folder / f".{WEIGHTS}.beef{files.PARTIAL}")
    shutil.copy(tmp_path / "new" / CONFIG, folder / CONFIG)
    if kept is not None:
        (folder / f".{CONFIG}.beef{files.PREVIOUS}").write_text(json.dumps(values | kept))
    with pytest.warns(UserWarning, match="interrupted.*the checkpoint before it"):
        loaded = lc.load_adapter(decoder(), folder)
    assert torch.equal(loaded(tokens()), wanted)


def test_checkpoint_that_is_being_saved_over_with_the_same_configuration_is_whole(folder):
    """PEFT's weights say nothing of theirs: until it is renamed, the one that is there is theirs."""
    wanted = lc.load_adapter(decoder(), folder)(tokens())
    tensors = load_file(folder / WEIGHTS)
    for name in (CONFIG, WEIGHTS):
        shutil.copy(folder / name, folder / f".{name}.beef{files.PARTIAL}")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(lc.load_adapter(decoder(), folder)(tokens()), wanted)


def test_checkpoint_error_is_that_of_the_save_where_nothing_can_be_removed(folder, monkeypatch):
    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(write_files.Path, "write_text", read_only)
    monkeypatch.setattr(write_files.Path, "unlink", read_only)
    with pytest.raises(lc.CheckpointError, match="cannot save an adapter in .*Read-only file system"):
        lc.save_adapter(adapted(decoder(), target_modules=["up_proj"]), folder)


def test_checkpoint_is_saved_where_folders_cannot_be_synchronised(folder, monkeypatch):
    sync = write_files._sync

    def files_alone(path):
        if path.is_dir():
            raise OSError(22, "Invalid argument")
        sync(path)

    monkeypatch.setattr(write_files, "_sync", files_alone)
    lc.save_adapter(adapted(decoder(), target_modules=["up_proj"], lora_alpha=99), folder)
    assert read(folder)["lora_alpha"] == 99


def test_checkpoint_litter_of_a_killed_process_is_removed_once_it_is_old(folder):
    kinds = (f".{WEIGHTS}.{{}}{files.PARTIAL}", f".{CONFIG}.{{}}{files.PARTIAL}", f".{CONFIG}.{{}}{files.PREVIOUS}")
    old, young = ([folder / kind.format(i) for kind in kinds] for i in range(2))
    for paths, age in ((old, 2), (young, 0.5)):
        written = time.time() - age * write_files.STALE_SECONDS
        for path in paths:
            path.write_bytes(b"half")
            os.utime(path, (written, written))
    lc.save_adapter(adapted(decoder(), target_modules=["q_proj"]), folder)
    assert not any(path.exists() for path in old)
    assert all(path.exists() for path in young)


# One process that forks a saver for each moment and kills it there: before and after every call that touches the disk.
KILLED = """
import os, shutil, signal, sys, time
import torch
torch.set_num_threads(1)
import safetensors.torch
from pathlib import Path
from lora_core.adapt import files, read_files, write_files

root, moments, foreign = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "foreign"
generations = {
    g: ({"peft_type": "LORA", "r": r, "lora_alpha": 6, "target_modules": ["q_proj"]},
        safetensors.torch.load_file(root / g / "adapter_model.safetensors"))
    for g, r in (("old", 4), ("new", 7))
}

def killed_at(moment, folder):
    calls = 0
    def counted(call):
        def wrapper(*args, **kwargs):
            nonlocal calls
            for step in (lambda: None, lambda: call(*args, **kwargs)):
                result = step()
                if calls == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                calls += 1
            return result
        return wrapper
    os.replace, os.fsync = counted(os.replace), counted(os.fsync)
    safetensors.torch.save_file = counted(safetensors.torch.save_file)
    write_files.write_checkpoint(folder, *generations["new"])
    os._exit(0)

for moment in range(moments):
    folder = root / f"moment{moment}"
    write_files.write_checkpoint(folder, *generations["old"])
    if foreign:
        # as PEFT writes them: the weights say nothing of their configuration
        safetensors.torch.save_file(
            generations["old"][1], folder / "adapter_model.safetensors", metadata={"format": "pt"}
        )
    child = os.fork()
    if child == 0:
        killed_at(moment, folder)
    _, status = os.waitpid(child, 0)
    (root / f"status{moment}").write_text(str(os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0))

# and at times the code does not choose, while larger files are being written over and over
folder = root / "loop"
large = {g: {"x": torch.full((2_000_000,), float(i))} for i, g in enumerate(generations)}
write_files.write_checkpoint(folder, generations["old"][0], large["old"])
for attempt in range(15):
    child = os.fork()
    if child == 0:
        while True:
            for g in ("new", "old"):
                write_files.write_checkpoint(folder, generations[g][0], large[g])
    time.sleep(0.005 + 0.011 * attempt)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    shutil.copytree(folder, root / f"loop{attempt}")
    for path in folder.glob(".*.partial"):
        path.unlink()
    write_files.write_checkpoint(folder, generations["old"][0], large["old"])
"""

# a copy of the configuration and its fsync, 2 temporary files: one save_file, 2 fsyncs, 2 renames, one fsync of the
# folder; before and after each of the seven calls
MOMENTS = 14


@pytest.fixture(scope="module", params=["own", "foreign"])
def killed(tmp_path_factory, request):
    root = tmp_path_factory.mktemp("killed")
    for name, r in (("old", 4), ("new", 7)):
        lc.save_adapter(adapted(decoder(), r=r, target_modules=["q_proj"]), root / name)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", KILLED, str(root), str(MOMENTS + 1), request.param],
        check=True,
        env=environment,
        cwd=os.getcwd(),
    )
    return root


@pytest.mark.parametrize("moment", range(MOMENTS))
@pytest.mark.filterwarnings("ignore:saving to .* was interrupted")
def test_checkpoint_killed_at_any_moment_loads_whole(killed, moment, tmp_path):
    assert (killed / f"status{moment}").read_text() == "9"
    folder = tmp_path / "copy"
    shutil.copytree(killed / f"moment{moment}", folder)
    loaded = lc.load_adapter(decoder(), folder)
    # the weights' rename is the moment of truth
    expected = "old" if moment <= 10 else "new"
    wanted = lc.load_adapter(decoder(), killed / expected)
    assert torch.equal(loaded(tokens()), wanted(tokens()))
    # and it can be saved over
    lc.save_adapter(wanted, folder)
    assert torch.equal(lc.load_adapter(decoder(), folder)(tokens()), wanted(tokens()))


def test_checkpoint_killed_between_the_renames_says_so(killed):
    assert read(killed / "moment10")["r"] == 7
    with pytest.warns(UserWarning, match="interrupted.*the checkpoint before it"):
        assert read_files.read_checkpoint(killed / "moment10").config["r"] == 4


def test_checkpoint_moments_cover_the_whole_save(killed):
    """One moment more and the save was over: nothing that touches the disk is left out."""
    assert (killed / f"status{MOMENTS}").read_text() == "0"


@pytest.mark.filterwarnings("ignore:saving to .* was interrupted")
def test_checkpoint_killed_while_writing_is_one_generation(killed):
    seen = set()
    for attempt in range(15):
        checkpoint = read_files.read_checkpoint(killed / f"loop{attempt}")
        values = checkpoint.tensors["x"].unique().tolist()
        assert values == [{4: 0.0, 7: 1.0}[checkpoint.config["r"]]]
        seen |= {p.suffix for p in (killed / f"loop{attempt}").iterdir()}
    assert files.PARTIAL in seen, "no kill met a save"


def test_checkpoint_litter_that_cannot_be_removed_is_no_failure(folder):
    """Gone when it is asked for its age, as a link that leads nowhere, or no file at all."""
    (folder / f".{WEIGHTS}.0{files.PARTIAL}").symlink_to(folder / "gone")
    odd = folder / f".{WEIGHTS}.1{files.PARTIAL}"
    odd.mkdir()
    os.utime(odd, (0, 0))
    lc.save_adapter(adapted(decoder(), target_modules=["q_proj"]), folder)
    assert list(adapter_layers(lc.load_adapter(decoder(), folder)))[0].endswith("q_proj")
