"""The sixteen levels of NF4 under the normal density they are made for."""

from typing import Any

from lora_core.demo.charts import COLOURS, Theme
from lora_core.quant.codebook import NF4_OFFSET, codebook

SIZE = (8.0, 2.7)
POINTS = 60
MARGIN = 0.04


def numbers() -> dict[str, Any]:
    """Return the levels, the borders of their buckets, and the normal whose NF4_OFFSET quantile is 1."""
    from scipy.stats import norm

    book = codebook("nf4")
    return {
        "title": "NF4: sixteen levels, one of them zero, where a normal distribution has its weights",
        "levels": book.levels.tolist(),
        "borders": [-1.0, *book.midpoints.tolist(), 1.0],
        "deviation": 1 / float(norm.ppf(NF4_OFFSET)),
    }


def draw(figure: Any, found: dict[str, Any], theme: Theme) -> None:
    """Draw each bucket as a slice of the density, with its level."""
    import numpy as np
    from scipy.stats import norm

    axes = figure.add_subplot()
    density = norm(scale=found["deviation"]).pdf
    borders = found["borders"]
    for code, (low, high) in enumerate(zip(borders[:-1], borders[1:], strict=True)):
        x = np.linspace(low, high, POINTS)
        axes.fill_between(x, density(x), color=COLOURS[0], alpha=(0.35, 0.65)[code % 2], linewidth=0)
        level = found["levels"][code]
        colour = COLOURS[1] if level == 0 else theme.ink
        axes.plot([level, level], [0, density(level)], color=colour, linewidth=1.6)
        axes.plot(level, density(level), "o", color=colour, markersize=4)
    axes.set_xlim(borders[0] - MARGIN, borders[-1] + MARGIN)
    axes.set_ylim(0, density(0) * 1.08)
    axes.set_yticks([])
    axes.set_xticks(found["levels"], [f"{level:.2f}" for level in found["levels"]], fontsize=7)
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("weight / largest of its block; a shade is what rounds to one level", fontsize=9)
