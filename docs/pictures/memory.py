"""What fine-tuning Llama-3-8B takes in full, with LoRA and with QLoRA: the sums of `lora-core memory`."""

from typing import Any

from lora_core.demo.charts import Theme
from lora_core.plan.catalogue import find_shape
from lora_core.plan.memory import plan_memory
from lora_core.plan.setup import METHODS, Setup

SIZE = (8.0, 3.0)
MODEL = "Llama-3-8B"
NAMES = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}
GIGA = 10**9
CARDS_GB = (24, 80)
# Okabe and Ito's, one for each row of a plan
COLOURS = ("#0072B2", "#E69F00", "#CC79A7", "#56B4E9", "#009E73", "#D55E00", "#999999")


def numbers() -> dict[str, Any]:
    """Return the bytes of every row of every method's plan, at the settings that `lora-core memory` starts from."""
    plans = {method: plan_memory(find_shape(MODEL), Setup(method=method)) for method in METHODS}
    return {
        "title": f"Memory to fine-tune {MODEL}, GB",
        "rows": [row.name for row in plans["full"].rows],
        "bytes": {method: [row.bytes for row in plan.rows] for method, plan in plans.items()},
        "setting": f"rank {Setup.rank}, {Setup.batch} x {Setup.sequence:,} tokens, {Setup.dtype}, AdamW",
    }


def draw(figure: Any, found: dict[str, Any], theme: Theme) -> None:
    """Draw a bar a method, a colour a row."""
    axes = figure.add_subplot()
    places = range(len(METHODS))[::-1]
    for row, (name, colour) in enumerate(zip(found["rows"], COLOURS, strict=True)):
        sizes = [found["bytes"][method][row] / GIGA for method in METHODS]
        before = [sum(found["bytes"][method][:row]) / GIGA for method in METHODS]
        axes.barh(places, sizes, left=before, color=colour, height=0.62, label=name)
    for place, method in zip(places, METHODS, strict=True):
        total = sum(found["bytes"][method]) / GIGA
        axes.annotate(f"{total:.1f}", (total, place), xytext=(5, 0), textcoords="offset points", va="center")
    for size in CARDS_GB:
        axes.axvline(size, color=theme.ink, linewidth=1, linestyle=":")
        axes.annotate(f"{size} GB", (size, -0.5), xytext=(4, 3), textcoords="offset points", fontsize=8)
    axes.set_yticks(places, [NAMES[method] for method in METHODS])
    axes.set_ylim(-0.55, len(METHODS) - 0.45)
    axes.grid(axis="x")
    axes.margins(x=0.08)
    axes.set_xlabel(found["setting"], fontsize=9)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8.5)
