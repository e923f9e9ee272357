"""Several processes at one folder: each sees one generation, and what they leave is one."""

import json
import os
import subprocess
import sys
import time

import pytest

from lora_core.adapt import files

# Savers write two generations in turn, of which the weights say which they are; a reader beside them tries each moment.
TOGETHER = """
import json, os, signal, sys, time, warnings
import torch
torch.set_num_threads(1)
from pathlib import Path
from lora_core.adapt.read_files import read_checkpoint
from lora_core.adapt.write_files import write_checkpoint

warnings.simplefilter("error")
folder, savers = Path(sys.argv[1]), int(sys.argv[2])

def save(generation):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": generation, "target_modules": ["q_proj"]}
    # another number of elements, so that a file of one with the header of the other would be seen, too
    write_checkpoint(folder, config, {"x": torch.full((1000 + generation,), float(generation))})

save(1)
children = []
for saver in range(savers):
    child = os.fork()
    if child == 0:
        # a saver that is asked to stop finishes first: a killed one is another test's
        asked = []
        signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
        while not asked:
            for generation in (2 * saver + 1, 2 * saver + 2):
                save(generation)
        os._exit(0)
    children.append(child)
seen = []
end = time.monotonic() + 3
try:
    while time.monotonic() < end:
        checkpoint = read_checkpoint(folder)
        (value,) = checkpoint.tensors["x"].unique().tolist()
        assert len(checkpoint.tensors["x"]) == 1000 + value and checkpoint.config["lora_alpha"] == value
        seen.append(int(value))
finally:
    for child in children:
        os.kill(child, signal.SIGTERM)
statuses = [os.waitpid(child, 0)[1] for child in children]
assert statuses == [0] * savers
read_checkpoint(folder)
print(json.dumps([sorted(set(seen)), sorted(path.name for path in folder.iterdir())]))
"""


@pytest.mark.skipif(os.name != "posix", reason="file systems know locks, and processes fork")
@pytest.mark.parametrize("savers", [1, 2])
def test_reading_beside_saving_sees_one_generation(tmp_path, savers):
    run = subprocess.run(
        [sys.executable, "-c", TOGETHER, str(tmp_path), str(savers)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    seen, left = json.loads(run.stdout)
    assert len(seen) > 1 and left == ["adapter_config.json", "adapter_model.safetensors"]


def seconds_to_take(folder, to_write):
    begin = time.monotonic()
    with files.held(folder, to_write=to_write):
        return time.monotonic() - begin


@pytest.mark.skipif(os.name != "posix", reason="file systems know locks, and processes fork")
def test_a_lock_ends_with_its_block_though_a_forked_process_lives_on(tmp_path):
    """As a worker that a thread has started while another saved."""
    with files.held(tmp_path, to_write=True):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        assert seconds_to_take(tmp_path, to_write=True) < files.LONGEST_WAIT_S / 2
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


@pytest.mark.skipif(os.name != "posix", reason="file systems know locks")
@pytest.mark.parametrize("to_write", [False, True])
def test_a_lock_leaves_no_folder_open(tmp_path, monkeypatch, to_write):
    opening, closing, opened, closed = os.open, os.close, [], []

    def counted(path, flags):
        opened.append(opening(path, flags))
        return opened[-1]

    monkeypatch.setattr(os, "open", counted)
    monkeypatch.setattr(os, "close", lambda descriptor: (closed.append(descriptor), closing(descriptor)))
    with files.held(tmp_path, to_write=to_write):
        assert len(opened) == 1 and not closed
    assert closed == opened


@pytest.mark.skipif(os.name != "posix", reason="file systems know locks")
def test_a_lock_that_is_not_let_go_is_waited_for_so_long(tmp_path, monkeypatch):
    """As in a signal's handler that saves, too, while its own thread is saving."""
    monkeypatch.setattr(files, "LONGEST_WAIT_S", 0.2)
    with files.held(tmp_path, to_write=False):
        assert seconds_to_take(tmp_path, to_write=False) < 0.2
        assert 0.2 <= seconds_to_take(tmp_path, to_write=True) < 10
