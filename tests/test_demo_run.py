"""The demo from end to end, in its quick form."""

import dataclasses
import io
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lora_core as lc
from lora_core.adapt.load import load_adapter
from lora_core.adapt.merge import merge_and_unload
from lora_core.adapt.write_files import STALE_SECONDS
from lora_core.cli import main
from lora_core.demo import charts
from lora_core.demo import run as demo_run
from lora_core.demo.adaptation import Adaptation, Losses, held_bytes, measure
from lora_core.demo.agreement import Agreement, logits
from lora_core.demo.base import QLORA, load_base
from lora_core.demo.files import write_atomically
from lora_core.demo.page import ALT, page
from lora_core.demo.run import run_demo, write_results
from lora_core.demo.settings import METHODS, DemoSettings, check_output, choose_device
from lora_core.demo.table import COLUMNS, agreement_lines, cells, print_results
from lora_core.demo.text import load_text
from lora_core.demo.weights import HISTOGRAM_BINS, HISTOGRAM_RANGE
from lora_core.errors import ConfigError, DeviceError, LoraCoreError

FILES = {"index.html", "results.json", "loss_curves.png", "quantization_error.png", "singular_values.png"}
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Threads that wait for each other lose much time where other tests take the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text():
    return load_text(load_base())


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text):
    """One quick run: its folder and its results."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_run, "load_text", lambda base: text)
        return folder, run_demo(folder, DemoSettings.quick(), CPU)


def test_demo_run_writes_every_file_and_no_other(finished):
    folder, _ = finished
    assert {path.name for path in folder.iterdir()} == FILES | {"qlora-adapter"}
    adapter = {path.name for path in (folder / "qlora-adapter").iterdir()}
    assert adapter == {"adapter_config.json", "adapter_model.safetensors"}


def test_demo_run_charts_are_pictures(finished):
    from PIL import Image

    folder, _ = finished
    for path in folder.glob("*.png"):
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            image.load()
            assert image.width > 600 and len(image.convert("RGB").getcolors(1 << 20)) > 10, path


def test_demo_run_page_refers_to_nothing_outside(finished):
    folder, results = finished
    html = (folder / "index.html").read_text("utf-8")
    links = re.findall(r"""(?:src|srcset|href|action|url)\s*[=(]\s*["']?([^"'\s>)]*)""", html)
    assert len(links) == 6 and all(link.startswith("data:image/png;base64,") for link in links)
    assert "<script" not in html and "@import" not in html and "$" not in re.sub(r"(?s)<pre>.*?</pre>", "", html)
    for row in results.rows:
        for cell in cells(row):
            assert cell in html


def test_demo_run_table_is_one_in_eighty_columns(finished):
    from rich.console import Console

    console = Console(file=io.StringIO(), width=80)
    print_results(finished[1], console)
    lines = console.file.getvalue().splitlines()
    for row in finished[1].rows[1:]:
        assert re.search(r"\s+".join(map(re.escape, cells(row))), next(x for x in lines if x.startswith(row.title)))


def test_demo_run_table_shows_the_measured_figures(finished):
    from rich.console import Console

    folder, results = finished
    console = Console(file=io.StringIO(), width=140)
    print_results(results, console)
    printed = console.file.getvalue()
    known = json.loads((folder / "results.json").read_text())
    for row in known["rows"]:
        line = next(line for line in printed.splitlines() if line.startswith(f"│ {row['title']} "))
        for figure in (row["before"]["code"], row["after"]["code"], row["before"]["prose"], row["after"]["prose"]):
            assert f" {figure:.3f} " in line
        assert f" {row['trainable']:,} " in line
        assert f" {row['weight_bytes'] / 2**20:.1f} " in line
        assert f" {row['optimizer_bytes'] / 2**20:.1f} " in line


def test_demo_run_qlora_figures_are_those_of_the_saved_adapter(finished, text):
    folder, results = finished
    base = load_base()
    model = load_adapter(base.quantized(), folder / "qlora-adapter")
    row = results.rows[-1]
    assert row.name == "qlora"
    assert measure(model, text, base, DemoSettings.quick()) == row.after
    assert held_bytes([*model.parameters(), *model.buffers()]) == row.weight_bytes
    assert sum(p.numel() for n, p in model.named_parameters() if "lora_" in n) == row.trainable
    # exp_avg and exp_avg_sq in float32, and a step of 4 bytes for each of the 2 x 24 matrices
    assert row.optimizer_bytes == 2 * 4 * row.trainable + 4 * 48


def test_demo_run_the_three_forms_agree(finished):
    agreement = finished[1].agreement
    assert agreement.agrees
    assert agreement.reloaded_difference == 0 and agreement.reloaded == agreement.trained
    assert 0 < agreement.merged_rounding < 1e-4 and agreement.merged_difference > 0
    # rounding to 4 bits again is another matter, and is said
    assert agreement.requantizing_error > 0.01 and agreement.requantized != agreement.merged


def test_demo_run_errors_of_the_three_forms_are_against_float64(finished, text):
    folder, results = finished
    base, exact = load_base(), load_adapter(load_base().dequantized(), folder / "qlora-adapter").double()
    merged = merge_and_unload(load_adapter(base.dequantized(), folder / "qlora-adapter"))
    windows = text.code_held_out[: DemoSettings.quick().agreement_windows * base.config.context]
    windows = windows.view(-1, base.config.context)
    off = (logits(merged, windows) - logits(exact, windows)).square().mean().sqrt().item()
    assert results.agreement.merged_rounding == pytest.approx(off, rel=1e-6)


def test_demo_run_says_whether_the_three_forms_agree(finished):
    results = finished[1]
    changed = dataclasses.replace(results.agreement, reloaded_difference=1e-7)
    assert agreement_lines(results)[-1] == "All three forms agree."
    assert agreement_lines(dataclasses.replace(results, agreement=changed))[-1] == "THE THREE FORMS DO NOT AGREE."


def test_demo_run_figures_are_what_their_names_say(finished):
    """Times in milliseconds, points at the steps they were measured after, QLoRA's start that of its own base."""
    results = finished[1]
    for row in results.rows:
        # a step of this model takes no microseconds, and no minutes
        assert 1 < row.step_ms < 60_000
        assert [step for step, _ in row.held_out_curve] == [0, 2, 4]
        losses = (row.before.code, row.after.code, row.before.prose, row.after.prose)
        assert cells(row)[5:] == tuple(f"{loss:.3f}" for loss in losses)
    *plain, qlora = results.rows
    assert all(row.before == plain[0].before for row in plain) and qlora.before != plain[0].before
    assert results.setting["tokens_per_step"] == 4 * load_base().config.context


def test_demo_run_weights_of_four_bits_are_off_by_a_share_of_their_norm(finished):
    by_name = {error.name: error for error in finished[1].quantization}
    weights = [m.weight.detach() for m in load_base().model().modules() if isinstance(m, torch.nn.Linear)]
    held = [lc.quantize_nf4(w, QLORA.block_size, double_quant=False).dequantize() for w in weights]
    off, size = (torch.cat([t.flatten() for t in each]).double() for each in (held, weights))
    assert by_name["NF4"].relative_error == pytest.approx(((off - size).norm() / size.norm()).item(), rel=1e-6)


def test_demo_run_energy_is_of_the_squares(finished):
    for spectrum in finished[1].spectra:
        squares = [value**2 for value in spectrum.singular_values]
        assert spectrum.energy_in_rank == pytest.approx(sum(squares[: finished[1].rank]) / sum(squares))


def test_demo_held_out_code_is_trained_on_nowhere(text):
    spelled = load_base().tokenizer.decode(text.code_held_out.tolist())
    assert spelled == "".join(text.corpus.code.held_out)


def test_demo_histogram_is_drawn_over_the_middles_of_its_bins(finished, monkeypatch):
    from matplotlib.axes import Axes

    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda axes, x, *rest, **how: (drawn.append(x), plot(axes, x, *rest, **how))[1])
    charts._draw(charts._quantization_error, finished[1], charts.LIGHT)
    # an odd number of bins around zero
    assert len(drawn) == 4 and all(abs(x[HISTOGRAM_BINS // 2]) < 1e-9 for x in drawn)
    assert all(x[0] - (-HISTOGRAM_RANGE) == pytest.approx(HISTOGRAM_RANGE - x[-1]) for x in drawn)


def test_demo_page_marks_the_best_of_the_columns_that_rank(finished):
    folder, results = finished
    html = (folder / "index.html").read_text("utf-8")
    lines = re.findall("<tr>(<td.*?)</tr>", html)
    marked = [[bool(mark) for mark in re.findall('<td( class="best")?>', line)] for line in lines]
    ranked = {2: "weight_bytes", 3: "optimizer_bytes"} | {6: "code", 8: "prose"}
    for column, name in ranked.items():
        values = [getattr(row if column < 4 else row.after, name) for row in results.rows]
        assert [line[column] for line in marked] == [value == min(values) for value in values]
    assert not any(line[column] for line in marked for column in range(len(COLUMNS)) if column not in ranked)


@pytest.mark.parametrize("same", [True, False])
def test_demo_page_says_where_this_pythons_prose_is_another(finished, same):
    results = finished[1]
    told = dataclasses.replace(results, setting=results.setting | {"same_prose_as_base": same})
    pictures = {f"{name}.png": b"" for name in ALT}
    assert ("documentation differs" in page(told, pictures, pictures)) is not same


def test_demo_step_trains_by_its_own_gradients_clipped(text):
    run = Adaptation(load_base(), METHODS[1], text, DemoSettings.quick(), CPU, Losses(1, 1))
    for _ in range(3):
        # what an earlier step or another hand has left behind
        for parameter in run.parameters:
            parameter.grad = torch.full_like(parameter, float("nan"))
        run.step()
        assert torch.stack([parameter.grad.norm() for parameter in run.parameters]).norm() < 1.0001


def test_demo_agreement_notices_a_changed_model(finished):
    agreement = finished[1].agreement
    assert not dataclasses.replace(agreement, reloaded_difference=1e-7).agrees
    assert not dataclasses.replace(agreement, merged_rounding=5 * agreement.trained_rounding).agrees
    assert isinstance(agreement, Agreement)


def test_demo_run_spectra_and_errors_are_of_whole_models(finished):
    results = finished[1]
    assert len(results.spectra) == 24
    assert all(s.singular_values == sorted(s.singular_values, reverse=True) for s in results.spectra)
    assert 0 < results.energy_in_rank < 1
    by_name = {error.name: error for error in results.quantization}
    assert by_name["NF4"].bits == 4.5
    assert 4 < by_name["NF4, double quantised"].bits < by_name["NF4"].bits
    assert by_name["NF4"].relative_error < by_name["FP4"].relative_error
    for error in results.quantization:
        assert 0.97 < sum(error.histogram) < 1 + 1e-6


def test_demo_run_same_seed_same_numbers(finished, tmp_path, text, monkeypatch):
    folder, first = finished
    monkeypatch.setattr(demo_run, "load_text", lambda base: text)
    second = run_demo(tmp_path, DemoSettings.quick(), CPU)

    def numbers(results):
        known = results.as_dict()
        for timing in ("seconds", "peak_memory_bytes"):
            del known[timing]
        for row in known["rows"]:
            del row["step_ms"]
        return known

    assert numbers(first) == numbers(second)
    assert (folder / "loss_curves.png").read_bytes() == (tmp_path / "loss_curves.png").read_bytes()
    # safetensors writes its metadata in any order, so the tensors are compared, not the files
    tensors, again = (load_file(path / "qlora-adapter" / "adapter_model.safetensors") for path in (folder, tmp_path))
    assert tensors.keys() == again.keys() and all(torch.equal(tensors[name], again[name]) for name in tensors)


def _adapted(method, text, seed, before):
    settings = DemoSettings.quick(seed)
    run = Adaptation(load_base(), method, text, settings, CPU, before)
    for _ in range(settings.steps):
        run.step()
    return run.finish()


def test_demo_adaptation_follows_the_seed(finished, text):
    first = next(row for row in finished[1].rows if row.name == "lora")
    lora = next(method for method in METHODS if method.name == "lora")
    same, other = (_adapted(lora, text, seed, first.before) for seed in (0, 1))
    assert same.train_curve == first.train_curve and same.after == first.after
    assert other.train_curve != first.train_curve


def test_demo_write_atomically_keeps_the_old_file_when_interrupted(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")

    def interrupted(temporary):
        temporary.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, interrupted)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt even where the test run was started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_demo_interrupted_while_training_writes_nothing_and_exits_130(tmp_path, text, monkeypatch, capsys):
    monkeypatch.setattr(demo_run, "load_text", lambda base: text)
    monkeypatch.setattr(Adaptation, "step", lambda run: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--quick", "--device", "cpu", "--output", str(tmp_path)])
    assert ended.value.code == 130
    assert "interrupted" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("moment", range(5))
def test_demo_interrupted_while_writing_leaves_whole_files(finished, tmp_path, monkeypatch, moment):
    """Each file is the old one or the new one, and no temporary file stays."""
    folder, results = finished
    for name in FILES:
        (tmp_path / name).write_bytes(b"old")
    replace, renamed = os.replace, []

    def interrupt(source, target):
        if len(renamed) == moment:
            signal.raise_signal(signal.SIGINT)
        replace(source, target)
        renamed.append(Path(target).name)

    monkeypatch.setattr(demo_run, "draw_charts", lambda results, theme: charts)
    charts = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_results(results, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES and len(renamed) == moment
    for name in FILES:
        assert (tmp_path / name).read_bytes() == ((folder / name).read_bytes() if name in renamed else b"old"), name


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--seed", "-1"], "seed is -1; want a whole number from 0"),
        (["--steps", "0"], "steps is 0; want a whole number from 1"),
        (["--device", "tpu"], "device is 'tpu'; want one of auto, cpu, cuda"),
        (["--base", "/nowhere"], "base.safetensors cannot be read"),
        (["--output", __file__], "is a file; want a folder"),
        (["--pretrain", "--steps", "-3"], "steps is -3; want a whole number from 1"),
        (["--pretrain", "--quick"], "--pretrain does not go with --quick"),
        (["--pretrain", "--device", "cuda"], "--pretrain does not go with --device cuda"),
        (["--pretrain", "--base", "x"], "--pretrain does not go with --base x"),
    ],
)
def test_demo_command_refuses_bad_input(arguments, told, capsys, tmp_path):
    output = [] if "--output" in arguments else ["--output", str(tmp_path / "new")]
    with pytest.raises(SystemExit) as ended:
        main(["demo", *output, *arguments])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def training_is_an_error(monkeypatch):
    """An output that cannot be written has to be found before anything takes time."""

    def trained(*arguments):
        pytest.fail("the run went on")

    monkeypatch.setattr(demo_run, "load_text", trained)
    monkeypatch.setattr("lora_core.demo.pretrain.load_corpus", trained)


@pytest.mark.usefixtures("training_is_an_error")
@pytest.mark.parametrize("file", [*sorted(FILES), "qlora-adapter/adapter_config.json"])
def test_demo_finds_a_folder_in_a_files_place_before_training(tmp_path, file):
    (tmp_path / file).mkdir(parents=True)
    with pytest.raises(ConfigError, match=f"{file} is a folder; want no folder where a file is written"):
        run_demo(tmp_path, DemoSettings.quick(), CPU)


@pytest.mark.usefixtures("training_is_an_error")
def test_demo_finds_a_file_in_the_adapters_place_before_training(tmp_path):
    (tmp_path / "qlora-adapter").write_text("")
    with pytest.raises(ConfigError, match="qlora-adapter is a file; want a folder"):
        run_demo(tmp_path, DemoSettings.quick(), CPU)


@pytest.mark.usefixtures("training_is_an_error")
@pytest.mark.parametrize("locked", ["", "new", "qlora-adapter"])
def test_demo_finds_a_folder_without_permission_before_training(tmp_path, locked, unreadable, capsys):
    output = tmp_path / "new" if locked == "new" else tmp_path
    if locked == "qlora-adapter":
        (tmp_path / locked).mkdir()
    unreadable(tmp_path / locked)
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--device", "cpu", "--output", str(output)])
    assert ended.value.code == 2
    assert "cannot be written: permission denied; want another folder" in capsys.readouterr().err


def test_demo_refuses_an_empty_name_of_a_folder(capsys):
    """As of a variable that is not set: it would write into the current one."""
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--quick", "--output", ""])
    assert stop.value.code == 2 and "--output is empty; want a folder" in capsys.readouterr().err


@pytest.mark.usefixtures("training_is_an_error")
def test_demo_pretraining_finds_a_folder_in_a_files_place_before_training(tmp_path):
    (tmp_path / "base.json").mkdir()
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--pretrain", "--output", str(tmp_path)])
    assert ended.value.code == 2


def test_demo_checking_the_output_leaves_nothing_in_it(tmp_path):
    check_output(tmp_path / "new", demo_run.FILES)
    assert list((tmp_path / "new").iterdir()) == []


def test_demo_run_checks_for_the_files_it_writes(finished):
    folder, _ = finished
    assert set(demo_run.FILES) == {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_demo_write_atomically_sweeps_what_a_killed_process_left(tmp_path):
    kept = ["index.html", ".index.9.png", ".index.x.html", ".index.7.html"]
    for name in (*kept, ".index.12.html"):
        (tmp_path / name).write_text("")
    long_ago = time.time() - STALE_SECONDS - 1
    for name in (".index.9.png", ".index.x.html", ".index.12.html"):
        os.utime(tmp_path / name, (long_ago, long_ago))
    write_atomically(tmp_path / "index.html", lambda path: path.write_text("new"))
    assert {path.name for path in tmp_path.iterdir()} == set(kept)


def test_demo_page_says_where_its_figures_come_from(finished):
    html = (finished[0] / "index.html").read_text("utf-8")
    assert "but for the base's size, steps and own loss, which are those of its record" in html.replace("&#x27;", "'")


def test_demo_page_scrolls_what_a_phone_is_too_narrow_for(finished):
    html = (finished[0] / "index.html").read_text("utf-8")
    wide = re.findall(r'<div class="card scroll"([^>]*)>(?:<table|<picture)', html)
    assert len(wide) == 4 and all('tabindex="0"' in attributes for attributes in wide)
    assert html.count("<picture>") == 3 and re.search(r"\.scroll img \{ min-width: \d+rem; \}", html)
    # and the table's heads wrap first
    assert re.search(r"thead th \{[^}]*white-space: normal", html)


def test_demo_says_what_is_missing_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(LoraCoreError, match=r"matplotlib.*pip install '.\[demo\]'"):
        run_demo(tmp_path, DemoSettings.quick(), CPU)


def test_demo_device_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    with pytest.raises(DeviceError, match="finds no GPU; use --device cpu"):
        choose_device("cuda")
    with pytest.raises(ConfigError, match="want one of"):
        choose_device("gpu")
