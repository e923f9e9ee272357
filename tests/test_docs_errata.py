"""The errata notebook: every claim is there, with both numbers asserted, and its table is that of today's library."""

import json
import re
from pathlib import Path

import pytest

from lora_core.plan.figures import figures

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "notebooks" / "7-errata.ipynb"
CELLS = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
# claims besides those of lora_core.plan.figures, by how their row begins
CLAIMS = (
    "IA3 scales the output", "Houlsby's adapter as drawn", "GPT-3, LoRA on Wq", "GPT-3, LoRA on Wk",
    "GPT-3, LoRA on Wv", "GPT-3, LoRA on Wq Wv", "GPT-3, LoRA on all four", "GPT-3, Wq and Wv, r = 1",
    "GPT-3, Wq and Wv, r = 64", "NF4 levels", "NF4 buckets", "double quantisation", "A goes up, B goes down",
    "dropout", "B @ A @ x", "formulas without a scale", "start of A: sqrt(2/r)", "start of A: N(0, .02)",
    "start of A: 1/sqrt(d)", "the start changes nothing", "alpha / r", "why rsLoRA", "B = 0 is why", "DoRA",
    "AdaLoRA", "intrinsic dimension", '"Layer-wise Optimal', "adding adapters", "Delta W is of low rank",
    "rank for reinforcement", "picture at rank", "sweep of r and alpha", "LoRA+", "VeRA", "8-bit AdamW", "recipe:",
    "comparison of methods", "diag(3, 2, .01)",
)  # fmt: skip
# published, and nothing here to compute
ONLY_PUBLISHED = ("IA3 scales the output", "Houlsby's adapter", "rank for reinforcement", '"Layer-wise')


def source(cell):
    return "".join(cell["source"])


def table(cells):
    """The rows of the last table that was printed as Markdown."""
    outputs = [
        o["data"]["text/markdown"] for c in cells for o in c.get("outputs", ()) if "text/markdown" in o.get("data", {})
    ]
    lines = "".join(outputs[-1]).splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


@pytest.mark.parametrize("claim", CLAIMS)
def test_errata_list_the_claim_with_all_its_columns(claim):
    rows = [row for row in table(CELLS) if row[0].startswith(claim)]
    assert rows and all(len(row) == 5 and all(row) for row in rows)


def test_errata_list_every_quoted_figure_as_the_library_computes_it():
    rows = {row[0]: row for row in table(CELLS)}
    subject = ""
    for figure in figures():
        subject = f"{subject.split(' ...')[0]} {figure.subject}" if figure.subject.startswith("...") else figure.subject
        _, said, formula, right, why = rows[subject]
        decimals = len(str(figure.said).partition(".")[2]) if figure.said < 1000 else 0
        holds = round(figure.right, decimals) == figure.said
        unit = f" {figure.unit}" if figure.unit else ""
        shown = [
            f"{v:,.0f}{unit}" if v >= 1000 else f"{v:.4g}{unit}"
            for v in (figure.said, figure.from_formula, figure.right)
        ]
        assert (said, formula) == (shown[0], f"{figure.formula} = {shown[1]}")
        assert (right, why.replace("\\|", "|")) == ("so it is" if holds else shown[2], figure.why)


def test_errata_cells_that_make_a_claim_assert_its_numbers():
    for cell in CELLS:
        text = source(cell)
        if cell["cell_type"] != "code" or not re.search(r"^\s*erratum\(", text, re.M):
            continue
        if not all(
            any(name in call for name in ONLY_PUBLISHED) for call in re.findall(r'erratum\(\s*"(?:[^"\\]|\\.)*', text)
        ):
            assert re.search(r"^\s*assert ", text, re.M), text[:200]


def test_errata_rows_are_those_their_cells_make():
    """Every claim in the sources that is a plain text stands in the table, and the count that was printed is right."""
    rows = table(CELLS)
    printed = next(
        int(m[1])
        for c in CELLS
        for o in c.get("outputs", ())
        if (m := re.search(r"(\d+) claims,", "".join(o.get("text", ""))))
    )
    assert printed == len(rows)
    for cell in CELLS:
        for claim in re.findall(r'^\s*erratum\(\s*"((?:[^"\\{]|\\.)+)"', source(cell), re.M):
            assert any(row[0] == claim.replace('\\"', '"') for row in rows), claim


def test_errata_ran_without_an_error():
    outputs = [o for c in CELLS for o in c.get("outputs", ())]
    assert len(outputs) > 10 and all(o["output_type"] != "error" for o in outputs)
    assert all(c["execution_count"] for c in CELLS if c["cell_type"] == "code")
