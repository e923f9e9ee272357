"""The demo asks for the same numbers every time, and for nothing once it is over."""

import dataclasses
import os
import sys

import pytest
import torch
import torch.nn.functional as F
import torch.utils.deterministic as memory

from lora_core.demo.deterministic import deterministic
from lora_core.demo.results import Results, forget_peak_memory, machine, peak_memory_bytes


def wishes():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        memory.fill_uninitialized_memory,
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_demo_is_deterministic_and_leaves_no_wish_behind(device, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = wishes()
    with pytest.raises(KeyboardInterrupt), deterministic(torch.device(device)):
        on, warned, filled, flash, efficient = wishes()
        assert on and warned and not filled
        # both may add gradients up in any order
        assert (flash or efficient) is (device == "cpu")
        q = torch.randn(1, 2, 4, 8, requires_grad=True)
        F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is (device == "cuda")
        raise KeyboardInterrupt
    assert wishes() == before


def test_demo_counts_the_memory_of_the_process_on_a_cpu():
    device = torch.device("cpu")
    forget_peak_memory(device)
    before = peak_memory_bytes(device)
    held = torch.ones(2**26)
    assert peak_memory_bytes(device) >= max(before, held.nbytes)
    assert machine(device)["memory"] == "of the process"


def test_demo_does_without_the_memory_of_the_process_where_no_system_counts_it(monkeypatch):
    """As on Windows, which has no such module."""
    monkeypatch.setitem(sys.modules, "resource", None)
    device = torch.device("cpu")
    assert peak_memory_bytes(device) is None
    known = dict.fromkeys((field.name for field in dataclasses.fields(Results)), None)
    results = Results(**{**known, "setting": machine(device)})
    assert results.peak_memory == "peak memory of the process unknown"


@pytest.mark.gpu
def test_demo_counts_the_memory_of_tensors_on_a_gpu():
    device = torch.device("cuda")
    held = torch.empty(2**26, device=device)
    del held
    forget_peak_memory(device)
    assert peak_memory_bytes(device) < 2**26
    held = torch.empty(2**26, dtype=torch.uint8, device=device)
    assert peak_memory_bytes(device) >= held.nbytes
    assert machine(device)["memory"] == "of tensors on the GPU"
