"""The whole demo: adapt four ways, compare, and write everything down."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lora_core.adapt.files import CONFIG, WEIGHTS
from lora_core.demo.adaptation import Adaptation, Adapted, measure
from lora_core.demo.agreement import check_agreement
from lora_core.demo.base import Base, load_base
from lora_core.demo.charts import DARK, DRAWINGS, LIGHT, draw_charts, require_matplotlib
from lora_core.demo.deterministic import deterministic
from lora_core.demo.files import write_atomically
from lora_core.demo.page import page
from lora_core.demo.progress import progress_bars
from lora_core.demo.results import Results, Row, forget_peak_memory, machine, peak_memory_bytes
from lora_core.demo.sample import prompt_of, write
from lora_core.demo.settings import METHODS, DemoSettings, check_output, check_seed, check_steps
from lora_core.demo.text import Text, load_text
from lora_core.demo.weights import quantization_errors, update_spectra

ADAPTER_FOLDER = "qlora-adapter"
# all that a run writes, by its place in the output folder
FILES = (
    *(f"{name}.png" for name in DRAWINGS),
    *("results.json", "index.html"),
    *(f"{ADAPTER_FOLDER}/{name}" for name in (CONFIG, WEIGHTS)),
)
# what the other parts take, in training steps, so that the bar of the whole run moves evenly
PREPARING, MEASURING, COMPARING = 35, 25, 40


def run_demo(output: Path, settings: DemoSettings, device: torch.device) -> Results:
    """Runs the demo and writes results.json, the charts, index.html and the QLoRA adapter.

    Args:
        output: a folder; its files are replaced one by one, each whole or not at all.
        settings: seed and sizes.
        device: where to run.
    Returns:
        All figures, measured in this run but for those of the base's record.
    Raises:
        ConfigError: on settings that cannot work.
        CheckpointError: if the base cannot be read.
        LoraCoreError: without matplotlib.
    """
    check_seed(settings.seed)
    check_steps(settings.steps)
    require_matplotlib()
    started = time.perf_counter()
    base = load_base(settings.base)
    # makes the folder: only what can run leaves one behind
    check_output(output, FILES)
    forget_peak_memory(device)
    with progress_bars() as progress, deterministic(device):
        total = PREPARING + len(METHODS) * (settings.steps + MEASURING) + COMPARING
        whole = progress.add_task("[bold]whole demo", total=total, note="")
        progress.update(whole, note="reading the standard library")
        text = load_text(base)
        unchanged = base.model().to(device)
        prompt = prompt_of(text, base)
        base_sample = write(unchanged, base, prompt, settings.sample_tokens, settings.seed)
        at_start = measure(unchanged, text, base, settings)
        progress.update(whole, advance=PREPARING, note="")
        runs: list[Adaptation] = []
        bars = []
        for method in METHODS:
            # the quantised base starts elsewhere, so it is measured anew
            before = None if method.quantized else at_start
            runs.append(Adaptation(base, method, text, settings, device, before))
            bars.append(progress.add_task(method.title, total=settings.steps, note=""))
        for _ in range(settings.steps):
            for run, bar in zip(runs, bars, strict=True):
                progress.update(bar, advance=1, note=f"{run.step():.2f} nats/token")
                progress.update(whole, advance=1)
        rows: list[Row] = []
        models: dict[str, Adapted] = {}
        for run in runs:
            adapted = models[run.method.name] = run.finish()
            rows.append(Row.of(adapted, write(adapted.model, base, prompt, settings.sample_tokens, settings.seed)))
            progress.update(whole, advance=MEASURING)
        rank = max(method.rank for method in METHODS if method.adapter)
        progress.update(whole, note="saving, reloading, merging, comparing")
        results = Results(
            setting=_setting(settings, base, text, device),
            rows=rows,
            agreement=check_agreement(models["qlora"], base, text, settings, device, output / ADAPTER_FOLDER),
            quantization=quantization_errors(base),
            spectra=update_spectra(base, models["full"].model, rank),
            rank=rank,
            prompt=base.tokenizer.decode(prompt),
            base_sample=base_sample,
            seconds=time.perf_counter() - started,
            peak_memory_bytes=peak_memory_bytes(device),
        )
        write_results(results, output)
        progress.update(whole, completed=total, note="")
    return results


def write_results(results: Results, output: Path) -> None:
    """Writes the figures, the charts and the page; all are made before the first is written."""
    charts, dark = draw_charts(results, LIGHT), draw_charts(results, DARK)
    html = page(results, charts, dark)
    figures = json.dumps(results.as_dict(), indent=1) + "\n"
    for name, content in charts.items():
        write_atomically(output / name, _writer(content))
    write_atomically(output / "results.json", _writer(figures.encode()))
    write_atomically(output / "index.html", _writer(html.encode()))


def _writer(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def _setting(settings: DemoSettings, base: Base, text: Text, device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    record = base.record
    return {
        "seed": settings.seed,
        "steps": settings.steps,
        "tokens_per_step": settings.batch * base.config.context,
        "table_windows": settings.table_windows,
        "curve_windows": settings.curve_windows,
        "parameters": record["parameters"],
        "base_steps": record["steps"],
        "base_nats_per_byte": record["held_out_nats_per_byte"],
        "base_file_bytes": base.file_bytes,
        "same_prose_as_base": record["prose_sha256"] == text.corpus.prose.sha256,
        "prose_sha256": text.corpus.prose.sha256,
        "code_sha256": text.corpus.code.sha256,
        **machine(device),
    }
