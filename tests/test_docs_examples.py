"""Every Python block in the documents runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# the checkout itself, however it is installed
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    (str(p.relative_to(ROOT)), code)
    for p in DOCUMENTS
    for code in re.findall(r"^```python\n(.*?)^```", p.read_text(), re.M | re.S)
]


@pytest.mark.parametrize(("name", "code"), BLOCKS, ids=[f"{n}-{i}" for i, (n, _) in enumerate(BLOCKS)])
def test_docs_example_runs(name, code, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()


def test_docs_have_an_example():
    assert any(name == "README.md" for name, _ in BLOCKS)


def test_docs_links_lead_somewhere():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_readme_names_files_that_exist():
    for path in re.findall(r"`((?:lora_core|quant|tests)/[\w/.]+)`", (ROOT / "README.md").read_text()):
        assert (ROOT / path).exists(), path
