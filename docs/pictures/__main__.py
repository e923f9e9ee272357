"""Draw README.md's pictures: `python -m docs.pictures`, each for a light and for a dark page, beside this file.

A picture's file holds a fingerprint of the numbers in it and of the code that drew it, so that a test can tell a
stale one whatever processor and fonts it was drawn with.
"""

import hashlib
import inspect
import io
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from docs.pictures import low_rank, memory, nf4, speed
from lora_core.demo.charts import DARK, LIGHT, Theme

FOLDER = Path(__file__).resolve().parent
PICTURES = {"low_rank": low_rank, "memory": memory, "nf4": nf4, "speed": speed}
# the text chunk of a PNG that holds the fingerprint
KEY = "Fingerprint"
# sharp where a screen has up to two pixels for each of a page's
PIXELS_PER_INCH = 144
PAD_IN = 0.1
# decimals of a number that the fingerprint sees: another processor's last bits are not another picture
DECIMALS = 6


def main() -> int:
    """Draw every picture, and say where."""
    for name, picture in PICTURES.items():
        found = picture.numbers()
        for theme in (LIGHT, DARK):
            path = FOLDER / f"{name}-{theme.name}.png"
            path.write_bytes(drawn(picture, found, theme))
            print(path)
    return 0


def fingerprint(picture: ModuleType, found: dict[str, Any]) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of what the picture shows and of the module that draws it."""
    shown = json.dumps(_rounded(found), sort_keys=True)
    return hashlib.sha256((shown + inspect.getsource(picture)).encode()).hexdigest()[:16]


def drawn(picture: ModuleType, found: dict[str, Any], theme: Theme) -> bytes:
    """Return the picture as PNG; equal numbers give equal bytes."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), theme.ink)
    paper = dict.fromkeys(("figure.facecolor", "axes.facecolor", "legend.facecolor"), theme.paper)
    lines = {"axes.edgecolor": theme.faint, "grid.color": theme.faint, "grid.linewidth": 0.6}
    plain = {"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "legend.frameon": False}
    with rc_context({**ink, **paper, **lines, **plain, "font.size": 10}):
        layout = ConstrainedLayoutEngine(w_pad=PAD_IN, h_pad=PAD_IN)
        figure = Figure(figsize=picture.SIZE, layout=layout)
        FigureCanvasAgg(figure)
        picture.draw(figure, found, theme)
        figure.suptitle(found["title"], x=0.01, ha="left", fontsize=11, fontweight="bold")
        file = io.BytesIO()
        metadata = {"Software": None, KEY: fingerprint(picture, found)}
        figure.savefig(file, format="png", dpi=PIXELS_PER_INCH, metadata=metadata)
    return file.getvalue()


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, DECIMALS)
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    sys.exit(main())
