"""The choice between a fused product and a library's."""

import json
import logging

import pytest
import torch

from lora_core.kernels import crossover
from lora_core.kernels.crossover import Measurement, faster_path


@pytest.fixture
def table(monkeypatch, tmp_path):
    """Write measurements where the library reads them."""

    def write(rows):
        path = tmp_path / "crossover.json"
        path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
        monkeypatch.setenv(crossover.VARIABLE, str(path))
        crossover.measurements.cache_clear()
        faster_path.cache_clear()

    yield write
    monkeypatch.undo()
    crossover.measurements.cache_clear()
    faster_path.cache_clear()


def row(m, fused, library, dtype="bfloat16"):
    return {
        **{"device": "chip", "dtype": dtype, "m": m, "n": 64, "k": 64, "r": 16},
        **{"fused_ms": fused, "library_ms": library},
    }


def test_faster_path_is_that_of_the_nearest_measurement_of_the_same_device_and_dtype(table):
    table([row(16, 1.0, 2.0), row(4096, 2.0, 1.0), row(4096, 1.0, 2.0, "float16")])
    assert faster_path("chip", torch.bfloat16, 20, 64, 64, 16) == "fused"
    assert faster_path("chip", torch.bfloat16, 3000, 64, 64, 16) == "library"
    # in the middle by ratio, 256, not by difference
    assert faster_path("chip", torch.bfloat16, 250, 64, 64, 16) == "fused"
    assert faster_path("chip", torch.bfloat16, 260, 64, 64, 16) == "library"
    assert faster_path("chip", torch.float16, 3000, 64, 64, 16) == "fused"


def test_faster_path_without_a_measurement_is_the_librarys(table):
    table([row(16, 1.0, 2.0)])
    assert faster_path("other chip", torch.bfloat16, 16, 64, 64, 16) == "library"
    assert faster_path("chip", torch.float32, 16, 64, 64, 16) == "library"
    # no rows and no ranks are sizes too
    assert faster_path("chip", torch.bfloat16, 0, 64, 64, 0) == "fused"


def test_faster_path_of_sizes_that_are_loaded_another_way_is_that_of_measurements_of_such(table):
    odd = row(16, 1.0, 2.0) | {"k": 63}
    table([row(16, 1.0, 2.0)])
    assert faster_path("chip", torch.bfloat16, 16, 64, 72, 16) == "library"
    assert faster_path("chip", torch.bfloat16, 16, 1, 64, 16) == "library"
    table([row(16, 2.0, 1.0), odd])
    assert faster_path("chip", torch.bfloat16, 16, 64, 72, 16) == "fused"
    assert faster_path("chip", torch.bfloat16, 16, 64, 64, 16) == "library"


def test_faster_path_tells_inputs_from_outputs(table):
    """An up projection is no down projection."""
    up, down = {"n": 4096, "k": 64}, {"n": 64, "k": 4096}
    table([row(16, 1.0, 2.0) | down, row(16, 2.0, 1.0) | up])
    assert faster_path("chip", torch.bfloat16, 16, 64, 4096, 16) == "fused"
    assert faster_path("chip", torch.bfloat16, 16, 4096, 64, 16) == "library"


def test_an_empty_variable_names_no_table(table, monkeypatch, caplog):
    table([])
    monkeypatch.setenv(crossover.VARIABLE, "")
    crossover.measurements.cache_clear()
    with caplog.at_level(logging.WARNING, "lora_core.kernels"):
        assert crossover.measurements() == crossover.read(crossover.SHIPPED)
    assert not caplog.text


@pytest.mark.parametrize("rows", ["no json", '[{"device": "chip"}]', "[1]"])
def test_a_damaged_table_is_said_and_not_followed(table, rows, caplog):
    table(rows)
    with caplog.at_level(logging.WARNING, "lora_core.kernels"):
        assert faster_path("chip", torch.bfloat16, 16, 64, 64, 16) == "library"
    assert "holds no measurements" in caplog.text


def test_the_shipped_table_can_be_read():
    assert all(isinstance(m, Measurement) for m in crossover.read(crossover.SHIPPED))
    assert crossover.SHIPPED.exists()
