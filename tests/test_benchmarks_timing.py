"""Timing, memory and verdicts of the benchmarks, on work whose cost is known."""

import dataclasses
import io
import re
import time

import numpy as np
import pytest
import torch
from rich.console import Console
from test_benchmarks_record import row

from benchmarks import run, shapes, timing
from benchmarks.case import Case, Check, Claim, Provider
from benchmarks.memory import peak_bytes, peak_bytes_of
from benchmarks.record import Record, read
from benchmarks.table import claim_lines, compare, table
from benchmarks.timing import AGAIN, Timing, interleave, median_error, quantile, spread, verdict

MIB = 2**20


def last(rounds):
    *_, final = rounds
    return final


def record_of(provider, median, scatter=0.0, samples=16, peak=1.0):
    low, high = median * (1 - scatter), median * (1 + scatter)
    return Record(**row(provider=provider, median_ms=median, p20_ms=low, p80_ms=high, samples=samples, peak_mib=peak))


def drawn(view):
    console = Console(file=io.StringIO(), width=200)
    console.print(view)
    return console.file.getvalue()


def test_benchmark_timing_recovers_a_known_ratio():
    runs = [Provider("short", lambda: time.sleep(0.002)), Provider("long", lambda: time.sleep(0.006))]
    timings = last(interleave(runs, samples=9, flush_bytes=0, repeat="short"))
    assert set(timings) == {"short", "long", "short" + AGAIN}
    ratio = timings["long"].median_ms / timings["short"].median_ms
    # sleeping overshoots by a scheduler's tick, never undershoots
    assert 1.5 < ratio < 4.5
    assert verdict(timings["short"].median_ms, timings["long"].median_ms, 0.2) == "faster"
    assert all(len(t.samples_ms) == 9 and t.warmup_ms >= 4 for t in timings.values())


def test_benchmark_timing_interleaves_and_reports_every_round():
    calls = []
    runs = [Provider(name, lambda name=name: calls.append(name)) for name in "ab"]
    rounds = list(interleave(runs, samples=6, warmup=0, flush_bytes=0))
    assert [len(r["a"].samples_ms) for r in rounds] == [1, 2, 3, 4, 5, 6]
    # each round holds every provider once, and the order changes between rounds
    pairs = [tuple(calls[i : i + 2]) for i in range(0, len(calls), 2)]
    assert set(pairs) == {("a", "b"), ("b", "a")}


def test_benchmark_timing_flushes_twice_the_largest_cache_that_linux_names(tmp_path, monkeypatch):
    for index, size in enumerate(("32K", "32K", "512K", "32768K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    monkeypatch.setattr(timing, "CACHES", tmp_path)
    assert timing.enough_to_flush("cpu") == 64 * MIB
    assert timing.enough_to_flush("cuda") == timing.FLUSH_BYTES
    monkeypatch.setattr(timing, "CACHES", tmp_path / "nowhere")
    assert timing.enough_to_flush("cpu") == timing.FLUSH_BYTES


def test_benchmark_timing_leaves_preparation_out():
    provider = Provider("p", lambda made: made, prepare=lambda: time.sleep(0.02))
    timing = last(interleave([provider], samples=3, warmup=1, flush_bytes=0))["p"]
    assert timing.median_ms < 10


def test_benchmark_timing_on_a_gpu_does_not_wait_between_the_flush_and_the_start(monkeypatch):
    """A device that runs what is queued one after another, and a host that takes 3 ms to launch: only work counts."""
    queue = {"host": 0.0, "free": 0.0}

    def launch(host_ms, device_ms):
        queue["host"] += host_ms
        queue["free"] = max(queue["free"], queue["host"]) + device_ms

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            launch(0.0, 0.0)
            self.at = queue["free"]

        def elapsed_time(self, other):
            return other.at - self.at

    class Buffer:
        def add_(self, _):
            launch(0.0, 10.0)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: queue.update(host=max(queue["host"], queue["free"])))
    # preparing is queued before, and is no part of it
    provider = Provider("p", lambda _: launch(3.0, 1.0), prepare=lambda: launch(0.5, 7.0))
    assert [timing._cuda_ms(provider, Buffer()) for _ in range(2)] == [1.0, 1.0]
    assert timing._cuda_ms(Provider("p", lambda: launch(3.0, 1.0)), None) == 4.0


def test_benchmark_quantiles_interpolate():
    assert [quantile((5.0, 1.0, 3.0), q) for q in (0.0, 0.25, 0.5, 1.0)] == [1.0, 2.0, 3.0, 5.0]


def test_benchmark_median_error_matches_simulated_medians():
    samples = np.random.default_rng(0).normal(100, 5, (4000, 25))
    simulated = np.median(samples, axis=1).std() / 100
    p20, p80 = np.quantile(samples, [0.2, 0.8])
    assert median_error(100.0, p20, p80, 25) == pytest.approx(simulated, rel=0.1)


def test_benchmark_ratio_inside_its_spread_is_a_tie():
    assert verdict(100.0, 103.0, within=0.05) == "tie"
    assert verdict(103.0, 100.0, within=0.05) == "tie"
    assert verdict(100.0, 107.0, within=0.05) == "faster"
    assert verdict(107.0, 100.0, within=0.05) == "slower"


def test_benchmark_spread_takes_scatter_and_self_difference():
    quiet, rival = record_of("lora_core", 100.0), record_of("rival", 110.0)
    noisy = record_of("rival", 110.0, scatter=0.3)
    assert spread(quiet, rival) == 0
    assert spread(quiet, rival, record_of("lora_core" + AGAIN, 120.0)) == pytest.approx(0.2)
    # a second slot that was faster says as much as one that was slower
    assert spread(quiet, rival, record_of("lora_core" + AGAIN, 50.0)) == pytest.approx(1.0)
    assert spread(quiet, noisy) > 0.1
    as_timing = Timing((100.0,) * 16, 0.0)
    assert spread(as_timing, noisy) == spread(quiet, noisy)


@pytest.mark.parametrize("count", [5, 15])
def test_benchmark_verdict_on_equal_providers_is_a_tie_as_often_as_it_says(count):
    """Percentiles of five samples lie within them, and call one comparison in twelve what it is not."""
    rng, wrong = np.random.default_rng(count), 0
    for _ in range(2000):
        ours, rival = (Timing(tuple(rng.normal(100, 5, count)), 0.0) for _ in range(2))
        wrong += verdict(ours.median_ms, rival.median_ms, spread(ours, rival)) != "tie"
    assert wrong / 2000 < 0.1


def test_benchmark_verdict_takes_more_than_a_sample():
    one = Timing((100.0,), 0.0)
    assert spread(one, Timing((300.0,), 0.0)) == float("inf")
    rows = [record_of(name, ms, samples=1) for name, ms in (("lora_core", 100.0), ("rival", 300.0))]
    lines, held = claim_lines([Claim("rival", speed=2.0)], rows, "lora_core")
    assert not held and "not measurable here" in lines[0]


def test_benchmark_table_gives_every_ratio_its_spread_and_steps_their_tokens():
    rows = [record_of("lora_core", 100.0), record_of("slow", 150.0, scatter=0.2), record_of("rival", 110.0)]
    text = drawn(table(rows, "lora_core"))
    assert "1.10 (faster, 0.0%)" in text and "tokens/s" not in text
    assert re.search(r"0\.73 \((slower|tie), \d+\.\d%\)", text)
    step = [dataclasses.replace(r, op="training_step", shape={"M": 1024, "K": 256}) for r in rows]
    assert "10,240" in drawn(table(step, "lora_core"))
    wide = [rows[0], record_of("rival", 700.0, scatter=0.3, samples=2)]
    assert "not measurable" in drawn(table(wide, "lora_core"))


def test_benchmark_claim_says_where_its_spread_reaches_below():
    rows = [record_of("lora_core", 100.0, scatter=0.2), record_of("rival", 205.0)]
    lines, held = claim_lines([Claim("rival", speed=2.0)], rows, "lora_core")
    assert held and lines[0].endswith("which reaches below")


def test_benchmark_costs_leave_no_job_the_whole_of_a_suite():
    """The time left is told by them: a copy of 2^27 bytes is no product of that size."""
    for suite in ("cpu", "gpu"):
        jobs = [shape for op in run.case_names() for shape in run.shapes_of(op, None, suite)]
        costs = [shapes.cost(shape) for shape in jobs]
        assert max(costs) < sum(costs) / 3
    assert shapes.cost({"K": 2**27}) < 2 * shapes.cost({"M": 1, "K": 1})


def test_benchmark_comparison_uses_the_second_slot():
    rows = [record_of("lora_core", 100.0), record_of("rival", 110.0), record_of("lora_core" + AGAIN, 88.0)]
    assert compare(rows[:2], "lora_core", "rival")[2] == "faster"
    assert compare(rows, "lora_core", "rival")[2] == "tie"


@pytest.mark.parametrize(
    ("claim", "held"),
    [
        (Claim("rival", no_slower=True), True),
        (Claim("rival", speed=1.9), True),
        (Claim("rival", speed=2.1), False),
        (Claim("rival", no_larger=True), False),
        (Claim(limit_ms=101), True),
        (Claim(limit_ms=99), False),
        (Claim("absent", no_slower=True), False),
    ],
)
def test_benchmark_claims_hold_only_as_measured(claim, held):
    rows = [record_of("lora_core", 100.0, peak=2.0), record_of("rival", 200.0, peak=1.0)]
    lines, result = claim_lines([claim], rows, "lora_core")
    assert result is held
    assert lines[0].startswith("holds" if held else "DOES NOT HOLD")


def test_benchmark_memory_counts_a_known_tensor():
    def work():
        first = torch.ones(8 * MIB, dtype=torch.uint8)
        second = torch.ones(4 * MIB, dtype=torch.uint8)
        del first
        return second, torch.ones(2 * MIB, dtype=torch.uint8)

    # 8 + 4 at the peak; 4 + 2 at the end; Python's own objects are far below a sixteenth of a MiB
    assert 12 * MIB <= peak_bytes(work) < 12 * MIB + MIB // 16


def test_benchmark_memory_counts_numpy_and_forgets_what_was_there():
    held = torch.ones(16 * MIB, dtype=torch.uint8)
    assert 4 * MIB <= peak_bytes(lambda: np.ones(4 * MIB, dtype=np.uint8)) < 4 * MIB + MIB // 16
    assert peak_bytes(lambda: held.add_(1)) < MIB // 16


def test_benchmark_memory_counts_the_backward():
    x = torch.ones(512, 512, requires_grad=True)

    # x is saved by the square; its gradient and one factor of it are alive together: three of 1 MiB
    peak = peak_bytes(lambda: (x * x).sum().backward())
    assert 2 * MIB <= peak <= 4 * MIB


def test_benchmark_memory_of_what_is_built_counts_what_it_keeps_and_not_what_building_took():
    def build():
        torch.ones(32 * MIB, dtype=torch.uint8)
        kept = torch.ones(4 * MIB, dtype=torch.uint8)
        return lambda: kept + torch.ones(2 * MIB, dtype=torch.uint8)[:1]

    # 4 kept; 2 and the sum's 4 above it
    assert 10 * MIB <= peak_bytes_of(build) < 10 * MIB + MIB // 16


@pytest.mark.parametrize("measure", [peak_bytes, peak_bytes_of])
def test_benchmark_memory_refuses_an_unknown_device(measure):
    with pytest.raises(ValueError, match="want 'cpu' or 'cuda'"):
        measure(lambda: lambda: None, "meta")


def test_benchmark_shapes_are_parsed_or_refused():
    assert shapes.parse("4096x128") == {"N": 4096, "K": 128}
    assert shapes.parse("M=2,R=1") == {"M": 2, "R": 1}
    for wrong in ("4096", "M=x", "rows=3", "M=0"):
        with pytest.raises(ValueError, match="shape"):
            shapes.parse(wrong)


def planted_case(worst):
    """A case whose rival is sound and whose own result is off by `worst`, with 0.1 allowed."""

    def check(name):
        error = worst if name == "lora_core" else 0.0
        return Check(error <= 0.1, error, error, f"off by {error}")

    providers = [Provider("lora_core", lambda: torch.ones(64)), Provider("rival", lambda: torch.ones(64))]
    return Case("planted", "fwd", {"N": 64}, "float32", None, providers, check, bytes_moved=256)


def test_benchmark_run_records_every_sound_provider(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "case_names", lambda: ["planted"])
    monkeypatch.setattr(run, "shapes_of", lambda *_: [{"N": 64}])
    monkeypatch.setattr(run, "cases_of", lambda *_: iter([planted_case(0.0)]))
    assert run.main(["--samples", "3", "--results", str(tmp_path)]) == 0
    rows = list(read(tmp_path / "planted.jsonl"))
    assert {r.provider for r in rows} == {"lora_core", "rival", "lora_core" + AGAIN}
    assert all(r.samples == 3 and r.floor_ms > 0 for r in rows)
    assert "best rival" in capsys.readouterr().out


@pytest.mark.parametrize(("given", "status"), [([], run.FAILED), (["--shape", "N=64"], 0)])
def test_what_is_claimed_decides_at_the_suites_shapes_alone(given, status, tmp_path, monkeypatch, capsys):
    claimed = dataclasses.replace(planted_case(0.0), claims=(Claim(limit_ms=0.0),))
    monkeypatch.setattr(run, "case_names", lambda: ["planted"])
    monkeypatch.setattr(run, "shapes_of", lambda *_: [{"N": 64}])
    monkeypatch.setattr(run, "cases_of", lambda *_: iter([claimed]))
    assert run.main(["--suite", "cpu", "--samples", "2", "--results", str(tmp_path), *given]) == status
    assert "DOES NOT HOLD: under 0 ms" in capsys.readouterr().out


def test_benchmark_run_neither_times_nor_records_a_wrong_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "case_names", lambda: ["planted"])
    monkeypatch.setattr(run, "shapes_of", lambda *_: [{"N": 64}])
    monkeypatch.setattr(run, "cases_of", lambda *_: iter([planted_case(0.5)]))
    assert run.main(["--samples", "2", "--results", str(tmp_path)]) == run.FAILED
    assert {r.provider for r in read(tmp_path / "planted.jsonl")} == {"rival"}
    assert "failed its check" in capsys.readouterr().out
