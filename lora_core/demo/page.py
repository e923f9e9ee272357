"""The page of a run: one HTML file that refers to nothing outside itself."""

import base64
from collections.abc import Iterable
from html import escape
from pathlib import Path
from string import Template

from lora_core.demo.results import MIB, Results
from lora_core.demo.table import COLUMNS, agreement_lines, cells

TEMPLATE = Path(__file__).with_name("page.html")
# columns where the smallest value is the best: weights, optimiser, code after, prose after; a step's time, of one run
# and without a spread, ranks nothing
SMALLEST_IS_BEST = (2, 3, 6, 8)

ALT = {
    "loss_curves": "Held-out loss on source code against training steps, one line per method",
    "quantization_error": "Distribution of the rounding error of four 4-bit formats",
    "singular_values": "Singular values of full fine-tuning's update of every matrix, relative to the largest",
}


def page(results: Results, light: dict[str, bytes], dark: dict[str, bytes]) -> str:
    """The whole page.

    Args:
        results: the figures.
        light: PNG by file name, for a light page.
        dark: the same for a dark page.
    Returns:
        HTML with the charts inside it.
    """
    pictures = {name: _picture(light[f"{name}.png"], dark[f"{name}.png"], alt) for name, alt in ALT.items()}
    return Template(TEMPLATE.read_text("utf-8")).substitute(
        lead=_lead(results),
        head="<tr>" + "".join(f"<th>{escape(column)}</th>" for column in COLUMNS) + "</tr>",
        rows=_rows(results),
        settings=_items(f"{row.title}: {row.settings}" for row in results.rows),
        prose_note="" if results.setting["same_prose_as_base"] else _other_prose(),
        rank=results.rank,
        energy=f"{100 * results.energy_in_rank:.0f}%",
        agreement=_items(agreement_lines(results)),
        samples=_samples(results),
        footer=_footer(results),
        **pictures,
    )


def _lead(results: Results) -> str:
    setting = results.setting
    return escape(
        f"A GPT of {setting['parameters']:,} parameters, pre-trained for {setting['base_steps']:,} steps on the prose "
        f"of Python's own documentation, learns Python source code in {setting['steps']} steps of "
        f"{setting['tokens_per_step']:,} tokens. The figures here were measured in this one run of "
        f"{results.seconds:.0f} seconds on {setting['device']}, but for the base's size, steps and own loss, which are "
        "those of its record."
    )


def _rows(results: Results) -> str:
    """The table's body, with the best of a column marked."""
    values = [(row.weight_bytes, row.optimizer_bytes, row.after.code, row.after.prose) for row in results.rows]
    best = {
        column: min(column_values)
        for column, column_values in zip(SMALLEST_IS_BEST, zip(*values, strict=True), strict=True)
    }
    lines = []
    for row, own in zip(results.rows, values, strict=True):
        marked = {column for column, value in zip(SMALLEST_IS_BEST, own, strict=True) if value == best[column]}
        cell = [
            f'<td class="best">{escape(text)}</td>' if index in marked else f"<td>{escape(text)}</td>"
            for index, text in enumerate(cells(row))
        ]
        lines.append(f"<tr>{''.join(cell)}</tr>")
    return "\n".join(lines)


def _other_prose() -> str:
    return (
        "<p>This Python's documentation differs from the one the base was trained on, so a few held-out documents may "
        "be edited versions of ones that it has read.</p>"
    )


def _items(lines: Iterable[str]) -> str:
    return "".join(f"<li>{escape(line)}</li>" for line in lines)


def _picture(light: bytes, dark: bytes, alt: str) -> str:
    """An image that follows the reader's colour scheme."""
    first, second = (f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in (dark, light))
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{first}">'
    picture = f'<picture>{source}<img src="{second}" alt="{escape(alt)}"></picture>'
    return _scroll(picture, alt)


def _scroll(content: str, label: str) -> str:
    """A part that is wider than a phone, which a keyboard can scroll too."""
    return f'<div class="card scroll" tabindex="0" role="region" aria-label="{escape(label)}">{content}</div>'


def _samples(results: Results) -> str:
    texts = [("the base, before", results.base_sample), *((row.title, row.sample) for row in results.rows)]
    prompt = f'<span class="prompt">{escape(results.prompt)}</span>'
    return "".join(
        f'<div class="card"><h3>{escape(title)}</h3><pre>{prompt}{escape(sample)}</pre></div>'
        for title, sample in texts
    )


def _footer(results: Results) -> str:
    setting = results.setting
    return escape(
        f"Seed {setting['seed']}. {setting['table_windows']} windows of held-out text per domain, "
        f"{setting['curve_windows']} for each point of a curve; {results.peak_memory}. "
        f"Base file {setting['base_file_bytes'] / MIB:.1f} MiB, "
        f"{setting['base_nats_per_byte']:.3f} nats per byte on all held-out prose when it was made. Python "
        f"{setting['python']}, PyTorch {setting['torch']}. Text: Python's standard library (PSF licence), prose "
        f"{setting['prose_sha256'][:12]}, code {setting['code_sha256'][:12]}."
    )
