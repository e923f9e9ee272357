"""Benchmark rows: exactly the schema, append-only, none without a passing check."""

import dataclasses
import json
import math
import subprocess

import pytest

from benchmarks import machine, run
from benchmarks.case import Case, Check, CheckError, Provider
from benchmarks.record import NAMES, SCHEMA, Record, RecordError, append, read, validate


def planted_case():
    """A comparison of this library and a rival, both sound."""
    providers = [Provider(name, list) for name in ("lora_core", "rival")]
    return Case("planted", "fwd", {"N": 64}, "float32", None, providers, lambda _: PASSED)


PASSED = Check(passed=True, max_error=0.25, rms_error=0.125)


def row(**changes):
    values = {
        "schema": SCHEMA,
        "timestamp_utc": "2026-01-01T00:00:00+00:00",
        "commit": "0" * 40,
        "dirty": False,
        "op": "nf4_quantize",
        "provider": "lora_core",
        "mode": "fwd",
        "shape": {"N": 8, "K": 4},
        "dtype": "bfloat16",
        "block_size": 64,
        "median_ms": 2.0,
        "p20_ms": 1.5,
        "p80_ms": 2.5,
        "samples": 5,
        "warmup_ms": 1.0,
        "peak_mib": 1.0,
        "bytes_moved": 100,
        "flops": None,
        "floor_ms": 0.1,
        "max_error": 0.25,
        "rms_error": 0.125,
        "device": "a processor, 2 threads",
        "driver": None,
        "cuda": None,
        "torch": "2.13.0",
        "triton": None,
        "python": "3.12.0",
        "seed": 0,
    }
    return {**values, **changes}


def test_benchmark_record_has_the_published_schema():
    published = (
        "schema timestamp_utc commit dirty op provider mode shape dtype block_size median_ms p20_ms p80_ms samples "
        "warmup_ms peak_mib bytes_moved flops floor_ms max_error rms_error device driver cuda torch triton python seed"
    )
    assert tuple(published.split()) == NAMES


def test_benchmark_record_round_trips_and_keeps_earlier_rows(tmp_path):
    path = tmp_path / "folder" / "op.jsonl"
    first, second = Record(**row()), Record(**row(provider="bitsandbytes", peak_mib=None))
    append(path, first, PASSED)
    before = path.read_bytes()
    append(path, second, PASSED)
    assert path.read_bytes().startswith(before)
    assert list(read(path)) == [first, second]


def test_benchmark_checkout_is_dirty_by_code_and_not_by_records(tmp_path):
    def git(*arguments):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)

    for name in (*machine.WRITTEN, "lora_core/x.py"):
        path = tmp_path / name if "." in name else tmp_path / name / "file"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "a")
    assert machine.checkout(tmp_path)["dirty"] is False and len(machine.checkout(tmp_path)["commit"]) == 40
    (tmp_path / "benchmarks" / "results" / "file").write_text("b")
    (tmp_path / "README.md").write_text("b")
    assert machine.checkout(tmp_path)["dirty"] is False
    (tmp_path / "lora_core" / "x.py").write_text("b")
    assert machine.checkout(tmp_path)["dirty"] is True


def test_benchmark_run_asks_about_the_checkout_once(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(machine, "checkout", lambda: asked.append(1) or {"commit": "0" * 40, "dirty": len(asked) > 1})
    monkeypatch.setattr(run, "case_names", lambda: ["planted"])
    monkeypatch.setattr(run, "shapes_of", lambda *_: [{"N": 64}, {"N": 32}])
    monkeypatch.setattr(run, "cases_of", lambda *_: iter([planted_case()]))
    assert run.main(["--suite", "cpu", "--samples", "1", "--results", str(tmp_path)]) == 0
    rows = list(read(tmp_path / "planted.jsonl"))
    assert len(rows) == 6 and not any(r.dirty for r in rows)


def test_benchmark_record_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Record(**row()).median_ms = 0.0


@pytest.mark.parametrize(
    "check",
    [
        None,
        Check(passed=False, max_error=0.25, rms_error=0.125, reason="an element is 3 times the bound off"),
        Check(passed=True, max_error=0.0, rms_error=0.0),
    ],
    ids=["unchecked", "failed", "another row's check"],
)
def test_benchmark_record_without_a_passing_check_is_not_written(tmp_path, check):
    path = tmp_path / "op.jsonl"
    with pytest.raises(CheckError, match="nf4_quantize by lora_core"):
        append(path, Record(**row()), check)
    assert not path.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": SCHEMA + 1}, "schema"),
        ({"mode": "forward"}, "mode"),
        ({"shape": {"rows": 4}}, "shape"),
        ({"shape": {"M": 1.5}}, "shape"),
        ({"median_ms": math.nan}, "median_ms"),
        ({"median_ms": 9.0}, "p80"),
        ({"median_ms": None}, "median_ms"),
        ({"max_error": math.inf}, "max_error"),
        ({"samples": 0}, "samples"),
        ({"samples": True}, "samples"),
        ({"dirty": "no"}, "dirty"),
        ({"device": ""}, "device"),
        ({"note": "extra"}, "note"),
    ],
)
def test_benchmark_record_refuses_what_the_schema_does_not_allow(changes, message):
    with pytest.raises(RecordError, match=message):
        validate(row(**changes))


def test_benchmark_record_refuses_a_missing_field():
    with pytest.raises(RecordError, match="seed"):
        validate({k: v for k, v in row().items() if k != "seed"})


def test_benchmark_reading_names_the_bad_line(tmp_path):
    path = tmp_path / "op.jsonl"
    append(path, Record(**row()), PASSED)
    path.write_text(path.read_text() + json.dumps(row(schema=99)) + "\n")
    with pytest.raises(RecordError, match="line 2"):
        list(read(path))


def test_a_copy_without_git_says_which_commit_it_was_copied_from(tmp_path, monkeypatch):
    monkeypatch.delenv("LORA_CORE_COMMIT", raising=False)
    assert machine.checkout(tmp_path) == {"commit": "unknown", "dirty": True}
    monkeypatch.setenv("LORA_CORE_COMMIT", "83f9769")
    assert machine.checkout(tmp_path) == {"commit": "83f9769", "dirty": False}


@pytest.mark.parametrize(
    ("written", "name"),
    [
        (
            "cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\nmodel name\t: AMD EPYC\n",
            "AMD EPYC family 25 model 17",
        ),
        ("model name\t: Neoverse-N1\nCPU part\t: 0xd0c\n", "Neoverse-N1"),
    ],
)
def test_processors_of_one_name_are_told_apart(tmp_path, written, name):
    (tmp_path / "cpuinfo").write_text(written)
    assert machine.processor(tmp_path / "cpuinfo") == name


@pytest.mark.parametrize("written", [None, "processor\t: 0\n"])
def test_processor_without_a_name_there_is_what_python_calls_it(tmp_path, monkeypatch, written):
    monkeypatch.setattr(machine.platform, "processor", lambda: "")
    monkeypatch.setattr(machine.platform, "machine", lambda: "riscv64")
    if written:
        (tmp_path / "cpuinfo").write_text(written)
    assert machine.processor(tmp_path / "cpuinfo") == "riscv64"
