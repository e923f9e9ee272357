"""What is compiled is kept until any file changes that it was made from."""

import importlib
import inspect
import shutil
from pathlib import Path

import pytest

pytest.importorskip("numba")

from lora_core.cpu import scales
from lora_core.cpu.compiled import jit, load
from lora_core.cpu.compiled.jit import compiled, stamp
from lora_core.quant import codebook
from lora_core.reference import dropout

FOLDER = Path(jit.__file__).parent
WRITTEN = """
def one_more(x):
    return x + 1
"""


def test_stamp_changes_with_every_file_the_loops_are_made_from(tmp_path):
    names = {path.name for path in FOLDER.glob("*.py")}
    parts = ("nf4", "nf4_product", "pick", "sixteen", "stream", "tile", "picked", "spread", "share")
    assert {f"{name}.py" for name in parts} <= names
    files = tuple(Path(shutil.copy(FOLDER / name, tmp_path)) for name in sorted(names))
    before = stamp.__wrapped__(files)
    for path in files:
        text = path.read_text()
        path.write_text(text + "\n")
        assert stamp.__wrapped__(files) != before
        path.write_text(text)
    assert stamp.__wrapped__(files) == before


def test_stamp_is_of_the_levels_the_scales_and_the_multipliers_too():
    files = inspect.signature(stamp).parameters["files"].default
    others = {Path(module.__file__) for module in (codebook, scales, dropout)}
    assert {path for path in files if path.parent != FOLDER} == others


def test_a_numba_that_does_not_go_with_this_numpy_is_done_without(monkeypatch):
    def broken(name):
        raise ValueError("numpy.dtype size changed, may indicate binary incompatibility")

    monkeypatch.setattr(importlib, "import_module", broken)
    assert load.__wrapped__("nf4") is None


def test_what_is_kept_is_compiled_anew_where_the_stamp_is_another(tmp_path, monkeypatch):
    (tmp_path / "kept.py").write_text(WRITTEN)
    monkeypatch.syspath_prepend(tmp_path)
    import kept

    def hits():
        made = compiled(kept.one_more)
        assert made(2) == 3
        return sum(made.stats.cache_hits.values())

    assert [hits(), hits()] == [0, 1]
    monkeypatch.setattr(jit, "stamp", lambda: "another")
    assert [hits(), hits()] == [0, 1]


def test_nothing_is_kept_by_a_numba_that_takes_no_stamp(tmp_path, monkeypatch):
    (tmp_path / "unkept.py").write_text(WRITTEN)
    monkeypatch.syspath_prepend(tmp_path)
    import unkept

    real = jit.njit

    def without(**options):
        def make(function):
            made = real(**options)(function)
            if options.get("cache"):
                del made._cache._cache_file._source_stamp
            return made

        return make

    monkeypatch.setattr(jit, "njit", without)
    made = compiled(unkept.one_more)
    assert made(2) == 3 and not list(tmp_path.rglob("*.nbc"))
