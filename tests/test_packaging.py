"""The wheel, the import names, and the cost of importing."""

import os
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(code, **keywords):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, **keywords).stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of what is needed, so that no build folder is left in the checkout."""
    import shutil

    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("lora_core", "quant"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", "out"]
    subprocess.run(command, check=True, cwd=source)
    return next((source / "out").glob("*.whl"))


def test_wheel_holds_the_mapped_folders_and_the_data(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    wanted = [
        "lora_core/quant/weight.py",
        "lora_core/py.typed",
        "lora_core/demo/base.safetensors",
        "lora_core/cpu/__init__.py",
    ]
    assert set(wanted) <= set(names)
    # no top-level package but our own: "kernels" belongs to somebody else
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"lora_core"}


def test_wheel_works_away_from_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import lora_core as lc, torch; print(lc.__file__, lc.quantize_nf4(torch.ones(4, 64)).bits_per_parameter)"
    path, bits = run(code, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")}).split()
    assert path.startswith(str(tmp_path)) and float(bits) > 4


@pytest.mark.peer
def test_transformers_imports_beside_the_checkout():
    """Run from the root, where a regular package kernels/ would shadow the one that transformers imports."""
    run("import lora_core; from transformers import PreTrainedModel", cwd=ROOT)


def test_importing_costs_little_more_than_torch():
    """Under 0.2 s, the median of five pairs; nothing heavy is loaded."""
    code = "import time; import torch; t = time.perf_counter(); import lora_core; print(time.perf_counter() - t)"
    assert statistics.median(float(run(code, cwd=ROOT)) for _ in range(5)) < 0.2
