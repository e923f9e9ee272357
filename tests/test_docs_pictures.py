"""README.md's pictures: there, and drawn from the numbers of today."""

import re
from pathlib import Path

import pytest
from PIL import Image

from docs.pictures import __main__ as command
from docs.pictures import memory, nf4
from lora_core.demo.charts import DARK, LIGHT
from lora_core.plan.catalogue import find_shape
from lora_core.plan.memory import plan_memory
from lora_core.plan.setup import Setup

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
# over this a picture is no longer a quick look
LARGEST_BYTES = 256 * 2**10


def stale(picture, path):
    return Image.open(path).text[command.KEY] != command.fingerprint(picture, picture.numbers())


@pytest.mark.parametrize("name", command.PICTURES)
@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_picture_shows_the_numbers_of_today(name, theme):
    path = command.FOLDER / f"{name}-{theme.name}.png"
    assert not stale(command.PICTURES[name], path), f"{path.name} is stale: python -m docs.pictures"
    assert path.stat().st_size < LARGEST_BYTES


def test_picture_of_other_numbers_or_other_code_is_stale(monkeypatch):
    path = command.FOLDER / f"memory-{LIGHT.name}.png"
    monkeypatch.setattr(memory, "MODEL", "Llama-2-7B")
    assert stale(memory, path)
    monkeypatch.undo()
    assert not stale(memory, path)
    assert command.fingerprint(nf4, memory.numbers()) != command.fingerprint(memory, memory.numbers())


def test_readme_shows_every_picture_for_both_themes():
    named = set(re.findall(r"(?:src|srcset)=\"([^\"]+)\"", README))
    drawn = {f"docs/pictures/{name}-{theme.name}.png" for name in command.PICTURES for theme in (LIGHT, DARK)}
    assert named == drawn
    assert all((ROOT / path).is_file() for path in named)
    shown = re.findall(r"<img [^>]+>", README)
    assert len(shown) == len(command.PICTURES)
    assert all(re.search(r'alt="[^"]{20,}"', tag) for tag in shown)


def test_pictures_are_drawn_by_one_command_the_same_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "PICTURES", {"memory": memory})
    contents = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        monkeypatch.setattr(command, "FOLDER", folder)
        assert command.main() == 0
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert contents[0] == contents[1]
    assert contents[0].keys() == {"memory-light.png", "memory-dark.png"}
    assert contents[0]["memory-light.png"] != contents[0]["memory-dark.png"]
    assert capsys.readouterr().out.count(".png") == 4


def test_memory_picture_draws_each_plan_to_its_length():
    from matplotlib.figure import Figure

    figure = Figure()
    memory.draw(figure, memory.numbers(), LIGHT)
    bars = figure.axes[0].patches
    ends = {round(bar.get_y(), 2): 0.0 for bar in bars}
    for bar in bars:
        ends[round(bar.get_y(), 2)] += bar.get_width() * memory.GIGA
    plans = [plan_memory(find_shape("Llama-3-8B"), Setup(method=method)) for method in ("full", "lora", "qlora")]
    drawn = [round(ends[place]) for place in sorted(ends, reverse=True)]
    assert drawn == [plan.total_bytes for plan in plans]
