"""The tables that kernels read: the same whatever dtype and device are the defaults when they are made."""

import contextlib

import pytest
import torch

from lora_core.kernels import groups, tables
from lora_core.kernels.grouped_lora import launch_grouped_lora
from lora_core.kernels.nf4_dequantize import launch_nf4_dequantize
from lora_core.kernels.nf4_quantize import launch_nf4_quantize
from lora_core.reference import nf4

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CACHES = (tables.levels, tables.thresholds, groups._offsets_and_widths, groups._chunks)


@pytest.fixture(autouse=True)
def made_anew():
    """Nothing is kept from another test, nor for one."""
    for cache in CACHES:
        cache.cache_clear()
    yield
    for cache in CACHES:
        cache.cache_clear()


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def every_table(device=DEVICE):
    return [
        tables.levels("nf4", device),
        tables.thresholds("nf4", device),
        tables.thresholds("dynamic", device),
        groups.rank_offsets((2, 0, 17), device),
        groups.rank_widths((2, 0, 17), device),
        groups.rank_chunks((2, 0, 17), 16, device),
    ]


@pytest.mark.parametrize(
    "defaults",
    [
        lambda: default_dtype(torch.bfloat16),
        lambda: default_dtype(torch.float64),
        lambda: torch.device("meta"),
    ],
    ids=["bfloat16", "float64", "meta"],
)
def test_tables_are_the_same_under_any_default_dtype_and_device(defaults):
    want = every_table()
    weight, x = torch.randn(2048, device=DEVICE), torch.randn(3, 8, device=DEVICE)
    lora_a, lora_b = torch.randn(5, 8, device=DEVICE), torch.randn(4, 5, device=DEVICE)
    adapter, scaling = torch.tensor([0, 1, -1], device=DEVICE), torch.ones(2, device=DEVICE)
    plain = launch_grouped_lora(x, None, lora_a, lora_b, [2, 3], adapter, scaling)
    codes, absmax = nf4.nf4_quantize(weight, 64)
    for cache in CACHES:
        cache.cache_clear()
    with defaults():
        made = every_table()
        got = launch_nf4_quantize(weight, 64)
        back = launch_nf4_dequantize(codes, absmax, None, None, (2048,), torch.float32, 64)
        grouped = launch_grouped_lora(x, None, lora_a, lora_b, [2, 3], adapter, scaling)
    for a, b in zip(made, want, strict=True):
        assert a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    assert torch.equal(got[0], codes) and torch.equal(got[1], absmax)
    assert torch.equal(back, nf4.nf4_dequantize(codes, absmax, None, None, (2048,), torch.float32, 64))
    assert all(torch.equal(a, b) for a, b in zip(grouped, plain, strict=True))


def test_tables_are_copied_outside_what_the_first_caller_has_in_force():
    """Inference mode marks what its thread makes, as a CUDA graph in preparation owns what its thread allocates."""
    with torch.inference_mode():
        assert not any(table.is_inference() for table in every_table(torch.device("meta")))


def test_tables_of_ranks_are_kept_in_a_bounded_number_but_for_those_a_graph_reads(monkeypatch):
    monkeypatch.setattr(groups, "_of_graphs", {})
    with monkeypatch.context() as capture:
        capture.setattr(groups, "_capturing", lambda device: True)
        read = groups.rank_offsets((3, 1), DEVICE)
    for rank in range(groups.KEPT + 5):
        groups.rank_offsets((rank, 1), DEVICE)
    assert groups._offsets_and_widths.cache_info().currsize == groups.KEPT
    assert groups.rank_offsets((3, 1), DEVICE) is read
