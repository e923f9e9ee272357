"""Work shared out among threads: PyTorch's own where they are GNU OpenMP's, else a pool."""

import threading

import pytest
import torch

from lora_core.cpu import chunks, team


@pytest.fixture(params=["openmp", "pool"])
def three(request, monkeypatch):
    if request.param == "pool":
        monkeypatch.setattr(team, "_openmp", lambda: None)
        monkeypatch.setattr(team, "_address", lambda: 0)
    elif team._openmp() is None:
        pytest.skip("this PyTorch runs on another OpenMP than GNU's")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_every_range_is_worked_once_by_several_threads(three):
    ranges, threads, all_here = [], set(), threading.Barrier(3, timeout=60)

    def work(first, last):
        if threading.get_ident() not in threads:
            threads.add(threading.get_ident())
            all_here.wait()
        ranges.append((first, last))

    chunks.run(work, 1003, chunk=10)
    assert len(threads) == 3 and threading.get_ident() in threads
    edges = sorted(ranges)
    assert edges[0][0] == 0 and edges[-1][1] == 1003
    assert all(a[1] == b[0] and b[0] % 10 == 0 for a, b in zip(edges, edges[1:], strict=False))


def test_failure_of_a_thread_is_raised(three):
    done = []

    def work(first, last):
        if first <= 500 < last:
            raise ValueError("range 500")
        done.append(range(first, last))

    with pytest.raises(ValueError, match="range 500"):
        chunks.run(work, 1000, chunk=10)
    # and the threads work on
    done.clear()
    chunks.run(lambda first, last: done.append(range(first, last)), 1000, chunk=10)
    assert any(500 in worked for worked in done)


def test_interrupting_is_raised(three):
    def work(first, last):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chunks.run(work, 1000, chunk=10)


def test_modes_reach_every_thread(three):
    modes = []
    for inference in (True, False):
        with torch.inference_mode(inference):
            chunks.run(lambda first, last: modes.append(torch.is_inference_mode_enabled()), 100, chunk=10)
        assert set(modes) == {inference}
        modes.clear()


def test_forked_process_does_not_wait_for_threads_it_lacks(three, monkeypatch):
    monkeypatch.setattr(team, "PROCESS", -1)
    threads = set()
    chunks.run(lambda first, last: threads.add(threading.get_ident()), 1000, chunk=10)
    assert threads == {threading.get_ident()}
