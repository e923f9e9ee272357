"""A picture rebuilt from its first singular values: the picture of notebook 1 at a few ranks."""

from typing import Any

import torch

from lora_core.demo.charts import Theme
from lora_core.reference.low_rank import nearest_of_rank, stored_numbers, truncation_error
from lora_core.reference.picture import picture

SIZE = (8.0, 2.0)
PIXELS = 64
RANKS = (1, 2, 5, 10, 20, PIXELS)


def numbers() -> dict[str, Any]:
    """Return what each rank stores and misses of the picture."""
    grey = picture(PIXELS).double()
    s = torch.linalg.svdvals(grey)
    return {
        "title": f"A picture of {PIXELS} x {PIXELS} at rank r: the numbers it takes, and the share it misses",
        "stored": [stored_numbers(PIXELS, PIXELS, rank) for rank in RANKS],
        "missed": [truncation_error(s, rank) / float(s.norm()) for rank in RANKS],
    }


def draw(figure: Any, found: dict[str, Any], theme: Theme) -> None:
    """Draw the picture at each rank, and last as it is."""
    grey = picture(PIXELS).double()
    for place, (rank, stored, missed) in enumerate(zip(RANKS, found["stored"], found["missed"], strict=True)):
        axes = figure.add_subplot(1, len(RANKS), place + 1)
        axes.imshow(nearest_of_rank(grey, rank), cmap="gray", vmin=0, vmax=1)
        whole = rank == PIXELS
        axes.set_title("as it is" if whole else f"r = {rank}", fontsize=9)
        axes.set_xlabel(f"{PIXELS * PIXELS:,}" if whole else f"{stored:,}, {missed:.1%}", fontsize=8)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
