"""Tables written from records: the newest run, its rival, and nothing edited by hand."""

import dataclasses

import pytest
from test_benchmarks_record import PASSED, row

from benchmarks import results_table
from benchmarks.markers import END, begin, replaced
from benchmarks.record import Record, append
from benchmarks.series import newest, rivals_of, runs
from benchmarks.table import best_rival
from benchmarks.timing import AGAIN


def rows(*medians, **changes):
    """A run: lora_core, bitsandbytes, matmul and lora_core again with these medians."""
    providers = ("lora_core", "bitsandbytes", "matmul", "lora_core" + AGAIN)
    return [
        Record(**row(provider=p, median_ms=m, p20_ms=m * 0.99, p80_ms=m * 1.01, **changes))
        for p, m in zip(providers, medians, strict=False)
    ]


def write(folder, *found):
    for record in found:
        append(folder / f"{record.op}.jsonl", record, PASSED)


@pytest.mark.parametrize("path", results_table.FILES, ids=lambda path: path.name)
def test_results_in_the_documentation_are_those_on_record(path):
    """Written anew from the committed records, the table is the committed one."""
    text = path.read_text(encoding="utf-8")
    written = results_table.table(ops=results_table.FILES[path])
    assert replaced(text, results_table.COMMAND, written, path.name) == text


def test_markers_replace_what_stands_between_them():
    text = f"a\n{begin('x')}\nold\n{END}\nb\n{begin('y')}\nkept\n{END}"
    assert replaced(text, "x", "new", "f") == text.replace("old", "new")
    for broken in ("no markers", f"{begin('x')}\nno end", text + text):
        with pytest.raises(ValueError, match="f: want one line"):
            replaced(broken, "x", "new", "f")


def test_rows_of_one_run_stand_together_and_the_newest_counts(tmp_path):
    old, new, other = rows(4.0, 2.0), rows(1.0, 2.0, 0.5, 1.0), rows(3.0, 3.0, shape={"N": 16, "K": 4})
    assert runs([*old, *new, *other]) == [old, new, other]
    write(tmp_path, *old, *other, *new)
    assert sorted(newest(tmp_path).values(), key=len) == [other, new]


def test_results_table_names_the_best_rival_and_no_lower_bound(tmp_path):
    write(tmp_path, *rows(1.0, 2.0, 0.5, 1.0))
    (line,) = [line for line in results_table.table(tmp_path).splitlines() if "nf4_quantize" in line]
    assert "| 1 | 2 (bitsandbytes) | 2.00x, faster (spread" in line and "0.5" not in line
    assert "N=8 K=4" in line and "NF4" in line


def test_results_table_calls_a_ratio_inside_its_spread_a_tie(tmp_path):
    write(tmp_path, *rows(1.0, 1.05, 0.5, 1.2))
    assert "1.05x, tie (spread 20%)" in results_table.table(tmp_path)


def test_results_table_gives_no_ratio_where_the_spread_is_wider_than_the_ratio(tmp_path):
    write(tmp_path, *rows(1.0, 7.0, 0.5, 2.1))
    text = results_table.table(tmp_path)
    assert "| 1 | 7 (bitsandbytes) | not measurable here (spread 110%) |" in text and "7.00x" not in text


def test_results_table_says_so_where_this_library_failed_its_check(tmp_path):
    """What failed is not on record: another provider's number must not stand in for it."""
    write(tmp_path, *rows(1.0, 2.0)[1:])
    (line,) = [line for line in results_table.table(tmp_path).splitlines() if "nf4_quantize" in line]
    assert "|  | 2 (bitsandbytes) | failed its check | 1.0 |" in line


def test_results_table_lists_full_fine_tuning_as_another_librarys(tmp_path):
    others = [
        dataclasses.replace(r, provider=p)
        for r, p in zip(rows(2.0, 1.0, 3.0), ("torch", "bitsandbytes", "torch" + AGAIN), strict=True)
    ]
    write(tmp_path, *(dataclasses.replace(r, op="training_step", shape={"M": 8, "K": 64}) for r in others))
    (line,) = [line for line in results_table.table(tmp_path).splitlines() if "training_step" in line]
    assert "|  | 1 (bitsandbytes), 2 (torch) | not this library | 1.0, 1.0 |" in line


def test_no_path_of_this_library_is_its_rival():
    run = rows(1.0, 2.0, 0.5, 1.0)
    forced = [dataclasses.replace(run[0], provider=f"lora_core {path}", median_ms=1.0) for path in ("fused", "library")]
    assert [r.provider for r in rivals_of([*run, *forced])] == ["bitsandbytes"]
    assert best_rival([*run, *forced], "lora_core").provider == "bitsandbytes"


def test_a_backward_whose_forward_has_made_the_weight_dense_is_no_rival(tmp_path):
    ours, theirs, *_ = rows(3.0, 4.0, op="nf4_lora_linear")
    dense = dataclasses.replace(theirs, provider="reference", median_ms=1.0, p20_ms=1.0, p80_ms=1.0)
    for mode, best in (("bwd", "bitsandbytes"), ("fwdbwd", "reference")):
        run = [dataclasses.replace(r, mode=mode) for r in (ours, theirs, dense)]
        assert min(rivals_of(run), key=lambda r: r.median_ms).provider == best
        assert best_rival(run, "lora_core").provider == best


def test_results_table_says_how_much_was_measured_with_uncommitted_changes(tmp_path):
    write(tmp_path, *rows(1.0, 2.0, dirty=False))
    assert "uncommitted" not in results_table.table(tmp_path)
    write(tmp_path, *rows(1.0, 2.0, dirty=True, shape={"N": 2, "K": 2}))
    assert "1 of 2 comparisons were measured with uncommitted changes" in results_table.table(tmp_path)


def test_results_table_lists_a_part_of_what_a_device_has_very_many_comparisons_of(tmp_path):
    few = [rows(1.0, 2.0, op="dora_norm", shape={"N": n, "K": 2}) for n in range(1, 4)]
    many = [rows(1.0, 2.0, shape={"M": m, "N": n, "K": 2, "R": 16}) for m in (1, 2) for n in range(1, 25)]
    write(tmp_path, *(row for found in (*few, *many) for row in found))
    text = results_table.table(tmp_path)
    assert text.count("| 1 |") == 3 + 24 and "M=2" not in text
    assert "27 of 51 comparisons are listed, all lie in benchmarks/results" in text


def test_results_table_keeps_devices_apart_and_says_what_no_gpu_measured(tmp_path):
    write(tmp_path, *rows(1.0, 2.0), *rows(5.0, 2.0, device="another, 4 threads"))
    text = results_table.table(tmp_path)
    assert text.count("| what |") == 2 and "not measured yet" in text and "--suite gpu" in text
    assert text.index("a processor") < text.index("| 1 |") and text.index("another") < text.index("| 5 |")
    write(tmp_path, *(dataclasses.replace(r, cuda="12.8", device="a GPU") for r in rows(0.1, 0.2)))
    assert "not measured yet" not in results_table.table(tmp_path)


def test_results_table_lists_work_without_a_rival(tmp_path):
    write(tmp_path, *rows(1.0))
    assert "| 1 |  |  | 1.0 |" in results_table.table(tmp_path)


def test_some_operations_are_listed_of_the_machine_that_ran_most_of_them_last(tmp_path):
    def ran(device, op, time):
        return rows(1.0, 2.0, device=device, op=op, timestamp_utc=f"2026-01-0{time}T00:00:00+00:00")

    both = [row for op, time in (("inject", 2), ("nf4_quantize", 3)) for row in ran("newer", op, time)]
    older = [row for op, time in (("inject", 1), ("nf4_quantize", 1)) for row in ran("older", op, time)]
    write(tmp_path, *older, *both, *ran("elsewhere", "lora_linear", 5))
    ops = ("inject", "nf4_quantize")
    assert {run[0].device for run in results_table.listed(tmp_path, ops)} == {"newer"}
    assert {run[0].device for run in results_table.listed(tmp_path)} == {"older", "newer", "elsewhere"}
    assert results_table.listed(tmp_path, ("dora_norm",)) == []
    # one that ran less than half of them last is not the one
    write(tmp_path, *ran("older", "generation_step", 1), *ran("newer", "generation_step", 3), *ran("few", "inject", 4))
    assert {run[0].device for run in results_table.listed(tmp_path, (*ops, "generation_step"))} == {"newer"}
