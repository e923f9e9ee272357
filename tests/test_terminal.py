"""What reaches a terminal: escaped control characters, and tables whose labels and numbers are whole at any width."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lora_core.terminal import Column, print_table, print_text, printable

COLUMNS = (Column("label"), Column("many", "number"), Column("few", "number"), Column("reason", "prose"))
ROWS = [
    ("trained parameters", "6,738,415,616", "39,976,960", "of all that there are"),
    ("... of all", "-", "0.59 %", ""),
]


def printed(width, show):
    console = Console(file=io.StringIO(), width=width)
    show(console)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [1, 12, 20, 40, 60, 70, 80, 200])
def test_terminal_table_keeps_labels_and_numbers_whole_at_any_width(width):
    shown = printed(width, lambda console: print_table(console, COLUMNS, ROWS))
    # a list that is narrower than its words wraps between them
    flat = " ".join(shown.split())
    for cell in ("trained parameters", "6,738,415,616", "39,976,960", "... of all", "0.59 %", "label", "many", "few"):
        assert cell in (flat if width < 40 else shown)
    assert all(word in shown for word in ROWS[0][-1].split())


def test_terminal_table_is_a_table_where_it_fits_and_a_list_elsewhere():
    wide, narrow = (printed(width, lambda console: print_table(console, COLUMNS, ROWS)) for width in (80, 40))
    assert max(map(len, wide.splitlines())) <= 80 and "│ trained parameters │ 6,738,415,616 │ 39,976,960 │" in wide
    assert "│" not in narrow and "trained parameters\n  many: 6,738,415,616\n  few: 39,976,960\n" in narrow


def test_terminal_table_goes_without_rules_and_wraps_its_heads_before_it_is_a_list():
    columns = (Column("label"), Column("loss before", "number"), Column("loss after", "number"))
    rows = [("a label", "1.5", "1.25"), ("another", "22.5", "3")]
    ruled, plain, listed = (printed(w, lambda c: print_table(c, columns, rows)) for w in (28, 22, 21))
    assert "│ a label │    1.5 │  1.25 │" in ruled.splitlines() and "┃         ┃   loss ┃  loss ┃" in ruled.splitlines()
    assert [line.rstrip() for line in plain.splitlines()] == [
        "           loss   loss",
        "label    before  after",
        "─" * 22,
        "a label     1.5   1.25",
        "another    22.5      3",
    ]
    assert "a label\n  loss before: 1.5\n" in listed


def test_terminal_cells_get_room_before_heads():
    columns, rows = (Column("method", "prose"), Column("loss before", "number")), [("full fine-tuning", "1.5")]
    assert "│ full fine-tuning │    1.5 │" in printed(29, lambda c: print_table(c, columns, rows)).splitlines()
    assert "full fine-tuning" not in printed(27, lambda c: print_table(c, columns, rows))


def test_terminal_name_may_be_broken_and_loses_nothing():
    name = "model.layers.0.self_attn.q_proj"
    shown = printed(34, lambda console: print_table(console, [Column("a", "name"), Column("b")], [(name, "16 x 64")]))
    assert "│" in shown and "16 x 64" in shown
    assert "".join(line.split("│")[1].strip() for line in shown.splitlines() if line.startswith("│")) == name


def test_terminal_text_is_taken_as_it_is():
    shown = printed(80, lambda console: print_table(console, [Column("[b]")], [("[red]x[/red]",)], title="[i]t"))
    assert "[red]x[/red]" in shown and "[b]" in shown and "[i]t" in shown


@given(st.text(alphabet=st.characters(categories=["Cc", "Cs", "Cf", "Zl", "Zp"]), min_size=1))
def test_terminal_shows_no_character_that_steers_it(text):
    assert printable(text).isascii() and printable(text).isprintable()


def test_terminal_leaves_text_and_escapes_the_rest():
    assert printable("naïve 雪") == "naïve 雪"
    assert printable("a\x1b[2J\n\x9b\ud800\u202e") == r"a\x1b[2J\n\x9b\ud800\u202e"
    assert "\x1b" not in printed(40, lambda console: print_text(console, "title \x1b]0;x\x07", styled=5))
