"""Who may import whom: a module imports only from its own layer or a lower one, and nothing is imported twice."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = [
    {"dtypes", "errors", "terminal"},
    {"quant"},
    {"reference"},
    {"ops"},
    {"kernels", "cpu", "layers"},
    {"methods"},
    {"adapt"},
    {"backends"},
    {"plan"},
    {"demo", "doctor", "inspect", "puzzles"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
FOLDERS = {"kernels": "lora_core.kernels", "quant": "lora_core.quant", "lora_core": "lora_core"}
FILES = [p for top in FOLDERS for p in sorted((ROOT / top).rglob("*.py"))]
# recognised through sys.modules, never imported by the library
PEERS = {"peft", "bitsandbytes", "transformers", "accelerate", "torchao", "unsloth"}


def level(module: str) -> int | None:
    parts = module.split(".")
    if parts[0] != "lora_core" or len(parts) < 2:
        return None
    return next((i for i, names in enumerate(LAYERS) if parts[1] in names), None)


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "lora_core":
                yield from (f"lora_core.{a.name}" for a in node.names)
            else:
                yield node.module


def name_of(path: Path) -> str:
    top, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[top], *rest])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_architecture_imports_point_downward(path):
    me = name_of(path)
    for other in imports(path):
        assert other.split(".")[0] not in PEERS, f"{me} imports {other}; recognise it through sys.modules"
        assert other.split(".")[0] not in ("kernels", "quant"), f"{me} imports the bare name {other}"
        mine, theirs = level(me), level(other)
        if mine is None or theirs is None or me.split(".")[1] == other.split(".")[1]:
            continue
        assert theirs < mine, f"{me} (layer {mine}) imports {other} (layer {theirs})"


def test_architecture_every_module_has_a_layer():
    """A new top-level module without a layer would escape the rule above."""
    without = [name_of(p) for p in FILES if level(name_of(p)) is None]
    assert without == ["lora_core.__init__"]


def test_architecture_kernels_is_a_namespace_folder():
    """With an __init__.py it would shadow the package that transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_architecture_import_needs_no_triton_and_no_peer():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import lora_core\n"
        f"heavy = {sorted(PEERS | {'scipy', 'rich', 'typer', 'matplotlib'})!r}\n"
        "loaded = [m for m in heavy if m in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
