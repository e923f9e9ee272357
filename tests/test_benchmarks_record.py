"""Benchmark rows: exactly the schema, append-only, none without a passing check."""

import dataclasses
import json
import math

import pytest

from benchmarks.case import Check, CheckError
from benchmarks.record import NAMES, SCHEMA, Record, RecordError, append, read, validate

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
