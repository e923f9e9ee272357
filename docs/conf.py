"""The site: `make docs` runs every notebook from scratch and builds build/docs.

Pages that compute in the browser stand in docs/interactive, complete, and are copied as they are.
"""

import importlib.metadata
import shutil
from pathlib import Path
from typing import Any

import sphinx.util.logging
from myst_nb.sphinx_ import NbMetadataCollector

LOG = sphinx.util.logging.getLogger(__name__)
DOCS = Path(__file__).resolve().parent
# what a notebook may take on two quiet cores, in seconds; a build on a slow or busy machine fails at SLACK times that
NOTEBOOK_LIMIT_S = 60
SLACK = 1.5
# from an interactive page to the site around it
BACK = '<a href="../interactive.html">lora-core</a>'

project = "lora-core"
author = "the lora-core developers"
version = release = importlib.metadata.version("lora-core")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
    # the fonts and scripts of MathJax, so that formulas need no network
    "sphinx-mathjax-offline",
    "sphinx_copybutton",
]
exclude_patterns = ["interactive", "notebooks/records"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb", ".rst": "restructuredtext"}
nitpicky = False

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

nb_execution_mode = "force"
# of a cell: a busy machine is given what the whole notebook is
nb_execution_timeout = round(SLACK * NOTEBOOK_LIMIT_S)
nb_execution_raise_on_error = True
nb_merge_streams = True
# a widget needs a running kernel: its cell shows its code, the next one the picture
nb_execution_excludepatterns: list[str] = []

html_theme = "furo"
html_title = "lora-core"
html_static_path: list[str] = []
html_copy_source = False
html_show_sphinx = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_custom_sections = [("Source", "notes_style")]
napoleon_use_rtype = False


def keep_formulas(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Show indented lines, which are formulas in this project's docstrings, as they stand."""
    kept: list[str] = []
    inside = False
    for line in lines:
        if line.startswith("    "):
            if not inside and (not kept or not kept[-1].strip()):
                kept += [".. code-block:: text", ""]
                inside = True
        elif line.strip():
            inside = False
        # elsewhere |x| is a magnitude, not a substitution
        kept.append(line if inside else line.replace("|", "\\|"))
    lines[:] = kept


def copy_pages(app: Any, exception: Exception | None) -> None:
    """Put the interactive pages, complete but for the way back, beside the rest."""
    if exception is None and app.builder.name == "html":
        left_out = shutil.ignore_patterns("*.py", "__pycache__")
        copied = Path(app.outdir) / "interactive"
        shutil.copytree(DOCS / "interactive", copied, dirs_exist_ok=True, ignore=left_out)
        for page in copied.glob("*.html"):
            text = page.read_text(encoding="utf-8")
            page.write_text(text.replace("<header>", f"<header>{BACK}", 1), encoding="utf-8")


def time_notebooks(app: Any, exception: Exception | None) -> None:
    """Fail the build if a notebook took too long."""
    if exception is not None or app.builder.name != "html":
        return
    slow = []
    for name in sorted(app.env.found_docs):
        ran = NbMetadataCollector.get_exec_data(app.env, name)
        if ran:
            LOG.info("%s: %.0f s", name, ran["runtime"])
            if ran["runtime"] > SLACK * NOTEBOOK_LIMIT_S:
                slow.append(name)
    if slow:
        raise RuntimeError(
            f"over {SLACK * NOTEBOOK_LIMIT_S:g} s: {', '.join(slow)}; {NOTEBOOK_LIMIT_S} s is what a notebook may take "
            "on two quiet cores: move what is heavy into a record"
        )


def setup(app: Any) -> None:
    """Register the hooks."""
    # before napoleon, which indents what it makes of Args: and Returns:
    app.connect("autodoc-process-docstring", keep_formulas, priority=400)
    app.connect("build-finished", copy_pages)
    app.connect("build-finished", time_notebooks)
