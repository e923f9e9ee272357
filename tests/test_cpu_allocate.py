"""Memory for results, in huge pages where the system has them."""

import mmap
import sys

import pytest
import torch

from lora_core.cpu import allocate


@pytest.mark.parametrize("shape", [(), (0, 5), (3,), (1025, 1027), [2048, 1024]])
def test_empty_is_a_contiguous_tensor(shape):
    dense = allocate.empty(shape, torch.bfloat16)
    assert dense.shape == torch.Size(shape) and dense.dtype == torch.bfloat16 and dense.is_contiguous()
    dense.resize_(4, 4)  # its memory is PyTorch's own
    assert dense.fill_(1).sum() == 16


def test_only_whole_pages_of_large_tensors_are_advised(monkeypatch):
    asked = []
    monkeypatch.setattr(allocate, "_advise", lambda: lambda *arguments: asked.append(arguments))
    allocate.empty((1024,), torch.float32)
    assert not asked
    dense = allocate.empty((1025, 1027), torch.float32)
    [(first, length, advice)] = asked
    assert first % mmap.PAGESIZE == length % mmap.PAGESIZE == 0 and advice == mmap.MADV_HUGEPAGE
    assert dense.data_ptr() <= first < dense.data_ptr() + mmap.PAGESIZE
    assert dense.nbytes - 2 * mmap.PAGESIZE < length <= dense.nbytes
    monkeypatch.setattr(allocate, "_advise", lambda: None)
    assert allocate.empty((2048, 1024), torch.float32).shape == (2048, 1024)


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux alone")
def test_the_system_knows_the_call():
    dense = allocate.empty((2048, 1024), torch.float32)
    first = -(-dense.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    assert allocate._advise()(first, mmap.PAGESIZE, mmap.MADV_HUGEPAGE) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux is asked")
@pytest.mark.parametrize("untouched", [0, 1, 2])
def test_memory_that_is_there_is_told_from_pages_yet_to_be_given(untouched):
    size = 2**22 + 5
    with mmap.mmap(-1, size) as pages:
        whole = torch.frombuffer(pages, dtype=torch.uint8)
        assert not allocate.is_resident(whole)
        for i in range(3):
            if i != untouched:
                whole[[0, size // 2, size - 1][i]] = 1
        assert not allocate.is_resident(whole)
        whole[[0, size // 2, size - 1][untouched]] = 1
        assert allocate.is_resident(whole)
        del whole


def test_memory_is_taken_to_be_new_where_the_system_cannot_be_asked(monkeypatch):
    there = torch.ones(2**20)
    assert not allocate.is_resident(there[:0])
    monkeypatch.setattr(allocate, "_residence", lambda: None)
    assert not allocate.is_resident(there)
