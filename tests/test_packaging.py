"""The wheel, the import names, and the cost of importing."""

import compileall
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# data that the package opens at run time, by its place in the wheel
DATA = [
    "lora_core/py.typed",
    "lora_core/kernels/crossover.json",
    *(f"lora_core/demo/{name}" for name in ("page.html", "tokenizer.json", "base.json", "base.safetensors")),
]
# none of these may load with the library: each costs more than all of it, or needs what a machine may lack
HEAVY = {
    "triton", "scipy", "typer", "rich", "safetensors", "matplotlib", "numba", "transformers", "peft", "bitsandbytes",
}  # fmt: skip
LEAST_OF = 5


def run(code, **keywords):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, **keywords).stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of what is needed, so that no build folder is left in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("lora_core", "kernels", "quant", "docs/puzzles"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", "out"]
    subprocess.run(command, check=True, cwd=source)
    return next((source / "out").glob("*.whl"))


def test_wheel_holds_every_module_and_the_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {f"lora_core/{p.relative_to(ROOT)}" for top in ("kernels", "quant") for p in (ROOT / top).glob("*.py")}
    modules |= {str(p.relative_to(ROOT)) for p in (ROOT / "lora_core").rglob("*.py")}
    modules |= {f"lora_core/puzzles/stubs/{p.name}" for p in (ROOT / "docs" / "puzzles").glob("*.py")}
    assert "lora_core/kernels/tile.py" in modules and "lora_core/quant/weight.py" in modules
    assert {*modules, *DATA} - names == set()
    # no top-level package but our own: "kernels" belongs to somebody else
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"lora_core"}


def test_source_distribution_holds_what_its_tests_take(tmp_path):
    """All of a checkout, so that a packager can run the suite, the benchmarks and the site from it."""
    left = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "*-output", "htmlcov")
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=left)
    shutil.copytree(ROOT / ".ci", source / ".ci")
    there = {str(p.relative_to(source)) for p in source.rglob("*") if p.is_file()}
    build = "from setuptools import build_meta; print(build_meta.build_sdist('out'))"
    name = run(build, cwd=source).split()[-1]
    with tarfile.open(source / "out" / name) as archive:
        held = {member.name.partition("/")[2] for member in archive}
    assert {"tests/conftest.py", "tests/solutions/01-lora-forward.py", "benchmarks/run.py", ".ci/run"} < there
    assert there - held == set()


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder away from the checkout with the wheel's files in it, and the environment that imports them."""
    site = tmp_path_factory.mktemp("away") / "site"
    zipfile.ZipFile(wheel).extractall(site)
    return {"cwd": site.parent, "env": {**os.environ, "PYTHONPATH": str(site)}}


def test_wheel_works_away_from_the_checkout(installed):
    code = "import lora_core as lc, torch; print(lc.__file__, lc.quantize_nf4(torch.ones(4, 64)).bits_per_parameter)"
    path, bits = run(code, **installed).split()
    assert path.startswith(str(installed["cwd"])) and float(bits) > 4


def test_wheel_imports_the_kernels(installed):
    code = "import lora_core.kernels.tile as tile; print(tile.__file__)"
    assert run(code, **installed).startswith(str(installed["cwd"]))


def test_wheel_starts_the_exercises(installed):
    run("from lora_core.cli import main; main(['puzzles', 'start', 'mine'])", **installed)
    stubs = ROOT / "docs" / "puzzles"
    copied = {p.name: p.read_bytes() for p in (installed["cwd"] / "mine").iterdir()}
    assert copied == {p.name: p.read_bytes() for p in stubs.glob("*.py")}


@pytest.mark.peer("transformers")
def test_transformers_imports_beside_the_checkout():
    """Run from the root, where a regular package kernels/ would shadow the one that transformers imports."""
    run("import lora_core; from transformers import PreTrainedModel", cwd=ROOT)


def test_importing_costs_little_more_than_torch(installed):
    """Under 0.2 s of processor time, which a busy machine does not add to; the least of a few runs."""
    # as pip does where it installs
    compileall.compile_dir(installed["env"]["PYTHONPATH"], quiet=1)
    code = "import time; import torch; t = time.process_time(); import lora_core; print(time.process_time() - t)"
    assert min(float(run(code, **installed)) for _ in range(LEAST_OF)) < 0.2


def test_importing_loads_nothing_heavy_that_torch_does_not():
    code = "import sys, torch; own = set(sys.modules); import lora_core; print(*sorted(set(sys.modules) - own))"
    loaded = {name.split(".")[0] for name in run(code, cwd=ROOT).split()}
    assert "lora_core" in loaded and loaded & HEAVY == set()


@pytest.mark.parametrize("cuda", [False, True])
def test_importing_takes_a_refused_import_for_an_absent_library(cuda):
    """Some tools block a library by a finder that raises."""
    code = """
import importlib.abc, sys, torch
class Refusing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("triton", "numba"):
            raise ImportError(f"{name} is not to be imported")
sys.meta_path.insert(0, Refusing())
"""
    code += "torch.version.cuda = '13.0'\n" * cuda
    code += "import lora_core as lc; from lora_core import backends\n"
    code += "print(lc.quantize_nf4(torch.randn(512, 600)).dequantize().shape, backends.why_no_kernels())"
    why = "Triton is not installed" if cuda else f"this PyTorch, {torch.__version__}, is not built for CUDA"
    assert run(code, cwd=ROOT).strip() == f"torch.Size([512, 600]) {why}"


def test_suite_leaves_out_and_counts_what_needs_an_absent_library(tmp_path):
    """A file that imports it is named, a test that needs it deselected."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.machinery as m\n"
        "find = m.PathFinder.find_spec\n"
        "hidden = lambda c, name, *a, **k: None if name.split('.')[0] == 'bitsandbytes' else find(name, *a, **k)\n"
        "m.PathFinder.find_spec = classmethod(hidden)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command.append("tests/test_adapt_chosen.py")
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and "(1 deselected)" in run.stdout, run.stdout
    assert "test_peer_bitsandbytes.py (without bitsandbytes)" in run.stdout
