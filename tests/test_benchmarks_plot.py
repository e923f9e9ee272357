"""Pictures and fits from records."""

import pytest
from test_benchmarks_tables import rows, write

from benchmarks import bars, plot
from benchmarks.fit import exponent
from benchmarks.record import RESULTS


@pytest.mark.parametrize("power", [-1.0, 0.0, 0.5, 2.0])
def test_exponent_recovers_a_power_law(power):
    sizes = [1.0, 3.0, 10.0, 200.0]
    assert exponent(sizes, [7 * s**power for s in sizes]) == pytest.approx(power, abs=1e-12)


def test_exponent_refuses_what_has_none():
    for sizes, costs in (([2.0], [1.0]), ([2.0, 2.0], [1.0, 2.0]), ([1.0, 2.0], [1.0, 0.0]), ([1.0, 2.0], [1.0])):
        with pytest.raises(ValueError, match="two or more different positive sizes"):
            exponent(sizes, costs)


def recorded(folder):
    """Roofs, a comparison, and a sweep over M."""
    write(folder, *rows(2.0, op="roof", flops=None, bytes_moved=10**8), *rows(2.0, 2.5, 1.0, 2.1))
    write(folder, *rows(4.0, op="roof", flops=10**9, bytes_moved=None, dtype="float32"))
    for m in (1, 4, 16, 64):
        shape = {"M": m, "N": 8, "K": 8, "R": 2}
        changes = {"op": "lora_linear", "dtype": "float32", "flops": 1000 * m, "shape": shape, "block_size": None}
        write(folder, *rows(1.0 * m, 2.0 * m, 0.5 * m, **changes))


def test_plot_draws_every_picture_the_records_allow_and_the_same_twice(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    recorded(tmp_path / "results")
    for folder in ("a", "b"):
        assert plot.main(["--results", str(tmp_path / "results"), "--pictures", str(tmp_path / folder)]) == 0
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {f"{kind}-a-processor-2-threads.png" for kind in ("bars", "roofline", "scaling")}
    for name in names:
        picture = (tmp_path / "a" / name).read_bytes()
        assert picture == (tmp_path / "b" / name).read_bytes() and len(picture) > 5000
    assert capsys.readouterr().out.count(".png") == 6


def test_plot_takes_the_largest_sweep_and_leaves_out_the_second_slot(tmp_path):
    recorded(tmp_path)
    found = list(plot.newest(tmp_path).values())
    chosen = plot._sweep(found, "lora_linear", "M")
    assert set(chosen) == {"lora_core", "bitsandbytes", "matmul"}
    assert sorted(chosen["lora_core"]) == [(1.0, 1.0), (4.0, 4.0), (16.0, 16.0), (64.0, 64.0)]
    assert plot._sweep(found, "lora_linear", "R") == {}


def test_lines_of_one_panel_are_told_apart_and_those_of_a_name_are_alike_everywhere():
    """In all that is on record."""
    found = list(plot.newest(RESULTS).values())
    for device in {run[0].device for run in found}:
        own = [run for run in found if run[0].device == device]
        for op, name, _ in plot.SWEEPS:
            lines = [plot.line_of(provider) for provider in plot._sweep(own, op, name)]
            assert len({line["color"] for line in lines}) == len({line["marker"] for line in lines}) == len(lines)


def test_a_sweep_is_of_one_commit_and_its_exponents_of_one_range(tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure
    recorded(tmp_path)
    shape = {"M": 256, "N": 8, "K": 8, "R": 2}
    same = {"op": "lora_linear", "dtype": "float32", "flops": 1000, "shape": shape, "block_size": None}
    write(tmp_path, *rows(256.0, 512.0, 128.0, **same, commit="another"))
    found = list(plot.newest(tmp_path).values())
    assert max(size for size, _ in plot._sweep(found, "lora_linear", "M")["lora_core"]) == 64
    for m in (256, 1024):
        write(tmp_path, *rows(1.0 * m, 2.0 * m, **same | {"shape": shape | {"M": m}}))
    drawn = figure()
    assert plot.scaling(drawn, list(plot.newest(tmp_path).values()))
    (axes,) = drawn.axes
    # the third provider's curve ends before the upper half does
    labels = sorted(text.get_text() for text in axes.get_legend().get_texts())
    assert labels == ["bitsandbytes: ~ 1.00", "lora_core: ~ 1.00", "matmul"]
    assert axes.get_legend().get_title().get_text() == "exponent from 64 on"


def test_roofline_leaves_out_what_does_other_work(tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure
    recorded(tmp_path)
    drawn = figure()
    assert plot.roofline(drawn, list(plot.newest(tmp_path).values()))
    labels = {text.get_text() for text in drawn.axes[0].get_legend().get_texts()}
    assert labels == {"lora_linear: rivals", "lora_linear: lora_core"}


def test_bars_leave_out_what_says_nothing_and_what_is_not_this_librarys(tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure
    told = rows(2.0, 2.5, 1.0, 2.1)
    noise = rows(2.0, 2.5, 1.0, 4.1, shape={"N": 16, "K": 4})
    failed = rows(2.0, 2.5, 1.0, shape={"N": 32, "K": 4})[1:]
    assert not plot.bars(figure(), [noise, failed])
    drawn = figure()
    assert plot.bars(drawn, [told, noise, failed]) and len(drawn.axes[0].patches) == 1


@pytest.mark.parametrize("folder", ["", "nowhere"])
def test_plot_without_records_draws_nothing_and_says_so(folder, tmp_path, capsys):
    assert plot.main(["--results", str(tmp_path / folder), "--pictures", str(tmp_path / "p")]) == 1
    assert f"nothing to draw in {tmp_path / folder}, which holds 0 comparisons" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_roofline_draws_no_second_slot(tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure
    recorded(tmp_path)
    shape = {"M": 1, "N": 8, "K": 8, "R": 2}
    write(tmp_path, *rows(1.0, 2.0, 0.5, 1.1, op="lora_linear", dtype="float32", flops=1000, shape=shape))
    drawn = figure()
    assert plot.roofline(drawn, list(plot.newest(tmp_path).values()))
    points = sum(len(drawn_as.get_offsets()) for drawn_as in drawn.axes[0].collections)
    # five comparisons of this library and one rival
    assert points == 10


def test_a_panel_without_exponents_has_no_title_of_them(tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure
    recorded(tmp_path)
    drawn = figure()
    assert plot.scaling(drawn, list(plot.newest(tmp_path).values()))
    legend = drawn.axes[0].get_legend()
    assert {text.get_text() for text in legend.get_texts()} == {"lora_core", "bitsandbytes", "matmul"}
    assert legend.get_title().get_text() == ""


def many(op, count, rank):
    """As many comparisons of one rank."""
    sizes = [{"M": m, "N": 8, "K": 8, "R": rank} for m in range(3, 3 + count)]
    return [rows(2.0, 2.5, 1.0, 2.1, op=op, shape=shape) for shape in sizes]


def test_bars_of_one_picture_are_limited_and_those_of_rank_16_come_first(monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    monkeypatch.setattr(bars, "MOST", 6)
    drawn = figure()
    assert plot.bars(drawn, many("dora_norm", 3, 64) + many("dora_norm", 4, 16))
    labels = [text.get_text() for text in drawn.axes[0].get_yticklabels()]
    assert [sum(f"R={rank}," in label for label in labels) for rank in (16, 64)] == [4, 2]
    assert "6 of 7 comparisons: R=16 first" in drawn.axes[0].get_xlabel()
    drawn = figure()
    assert plot.bars(drawn, many("dora_norm", 12, 16))
    labels = [text.get_text() for text in drawn.axes[0].get_yticklabels()]
    assert [label.split(" ")[3] for label in labels] == [f"M={m}" for m in range(3, 15, 2)]
    drawn = figure()
    assert plot.bars(drawn, many("dora_norm", 6, 16)) and "comparisons" not in drawn.axes[0].get_xlabel()


def test_an_operation_with_too_many_bars_has_a_picture_of_its_own(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bars, "MOST", 3)
    for run in many("dora_norm", 4, 16) + many("inject", 3, 16):
        write(tmp_path / "results", *run)
    shown = {}
    monkeypatch.setattr(plot, "bars", lambda _, found, elsewhere=(): shown.update({found[0][0].op: list(elsewhere)}))
    plot.main(["--results", str(tmp_path / "results"), "--pictures", str(tmp_path / "p")])
    assert shown == {"inject": ["dora_norm"], "dora_norm": []}
    monkeypatch.undo()
    monkeypatch.setattr(bars, "MOST", 3)
    assert plot.main(["--results", str(tmp_path / "results"), "--pictures", str(tmp_path / "p")]) == 0
    names = sorted(path.name for path in (tmp_path / "p").glob("bars*"))
    assert names == [f"bars-{name}a-processor-2-threads.png" for name in ("", "dora_norm-")]


def test_bars_name_the_operations_drawn_elsewhere():
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn = figure()
    assert plot.bars(drawn, many("dora_norm", 1, 16), elsewhere=["lora_linear"])
    assert "in pictures of their own: lora_linear" in drawn.axes[0].get_xlabel()
