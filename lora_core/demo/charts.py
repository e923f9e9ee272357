"""The three charts, drawn with matplotlib for a light and for a dark page."""

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_core.demo.results import Results
from lora_core.demo.weights import HISTOGRAM_BINS, HISTOGRAM_RANGE
from lora_core.errors import LoraCoreError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
DASHES = ("-", "--", "-.", ":")
PIXELS_PER_INCH = 144


@dataclass(frozen=True)
class Theme:
    """Colours of a page."""

    name: str
    paper: str
    ink: str
    faint: str


LIGHT = Theme("light", "#ffffff", "#1b1f24", "#d5dae0")
DARK = Theme("dark", "#161b22", "#e6edf3", "#3a434d")


def require_matplotlib() -> None:
    """Raises LoraCoreError if there is nothing to draw with, before any work is done."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise LoraCoreError(
            "the demo draws its charts with matplotlib, which is not installed; want: pip install matplotlib, or in a "
            "checkout pip install '.[demo]'"
        ) from error


def draw_charts(results: Results, theme: Theme) -> dict[str, bytes]:
    """Each chart's PNG by file name."""
    return {f"{name}.png": _draw(drawing, results, theme) for name, drawing in DRAWINGS.items()}


def _draw(drawing: Any, results: Results, theme: Theme) -> bytes:
    """One chart as PNG; the figure is not registered with pyplot, so nothing is left behind."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ink = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), theme.ink)
    paper = dict.fromkeys(("figure.facecolor", "axes.facecolor", "legend.facecolor"), theme.paper)
    other = {"axes.edgecolor": theme.faint, "grid.color": theme.faint, "legend.edgecolor": theme.faint, "font.size": 10}
    hidden = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.linewidth": 0.6}
    style: dict[Any, Any] = {**ink, **paper, **other, **hidden}
    with rc_context(style):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        drawing(results, figure, theme)
        file = io.BytesIO()
        # no date or version in the file: equal figures give equal bytes
        figure.savefig(file, format="png", dpi=PIXELS_PER_INCH, metadata={"Software": None})
    return file.getvalue()


def _axes(figure: "Figure", title: str, x: str, y: str) -> "Axes":
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return axes


def _loss_curves(results: Results, figure: "Figure", theme: Theme) -> None:
    windows = f"{results.setting['curve_windows']} of the table's {results.setting['table_windows']} windows"
    axes = _axes(figure, f"Loss on held-out source code, {windows}", "step", "nats per byte")
    for row, colour, dash in zip(results.rows, COLOURS, DASHES, strict=True):
        steps, losses = zip(*row.held_out_curve, strict=True)
        axes.plot(steps, losses, dash, color=colour, marker="o", markersize=4, linewidth=2, label=row.title)
    axes.set_xlim(left=0)
    axes.legend()


def _quantization_error(results: Results, figure: "Figure", theme: Theme) -> None:
    title = "Error of the base's weights held in 4 bits"
    axes = _axes(figure, title, "(dequantised - weight) / largest weight of its block", "share of weights")
    width = 2 * HISTOGRAM_RANGE / HISTOGRAM_BINS
    edges = [-HISTOGRAM_RANGE + width * (index + 0.5) for index in range(HISTOGRAM_BINS)]
    for error, colour, dash in zip(results.quantization, COLOURS, DASHES, strict=True):
        label = f"{error.name}: {error.bits:.2f} bits, relative error {error.relative_error:.3f}"
        axes.plot(edges, error.histogram, dash, drawstyle="steps-mid", color=colour, linewidth=1.8, label=label)
    axes.set_ylim(bottom=0)
    axes.set_xlim(-HISTOGRAM_RANGE, HISTOGRAM_RANGE)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8.5)


def _spectra(results: Results, figure: "Figure", theme: Theme) -> None:
    title = "Singular values of full fine-tuning's update, a line a layer"
    axes = _axes(figure, title, "index", "singular value / largest")
    kinds = list(dict.fromkeys(spectrum.name.rpartition(".")[2] for spectrum in results.spectra))
    shades = (*COLOURS, "#E69F00", "#56B4E9")
    for kind, colour in zip(kinds, shades, strict=False):
        of_kind = [spectrum.singular_values for spectrum in results.spectra if spectrum.name.endswith(kind)]
        for number, values in enumerate(of_kind):
            label = kind if number == 0 else None
            axes.semilogy(
                range(1, len(values) + 1), [value / values[0] for value in values], color=colour, alpha=0.7, label=label
            )
    axes.axvline(results.rank, color=theme.ink, linestyle=":", linewidth=1.5)
    note = f" r = {results.rank}: {100 * results.energy_in_rank:.0f}% of the energy"
    axes.annotate(note, (results.rank, 1.0), xytext=(4, -2), textcoords="offset points", va="top")
    axes.set_ylim(1e-3, 1.3)
    axes.set_xlim(0, max(len(spectrum.singular_values) for spectrum in results.spectra))
    axes.legend(ncols=2)


DRAWINGS = {"loss_curves": _loss_curves, "quantization_error": _quantization_error, "singular_values": _spectra}
