"""What reaches a terminal: no control characters, and tables that cut nothing however narrow it is."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console

# the shell's status for a program ended by Ctrl-C
INTERRUPTED = 130

Kind = Literal["label", "number", "prose", "name"]
# a name longer than this may be broken over lines, so that a table of long names is still a table
SHORTEST_FOLD = 16
# between two columns: a cell's padding on either side and a rule, or two blanks
RULED, PLAIN = 3, 2


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        head: its title.
        kind: "label" and "number" stay on one line, a number to the right; "prose" wraps between words, as every head
            does; a "name" may be broken anywhere.
    """

    head: str
    kind: Kind = "label"


def printable(text: str) -> str:
    """The text with control characters, surrogates and invisible marks escaped: a file cannot steer a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def print_text(console: "Console", text: str, style: str = "bold", styled: int = 0, indent: str = "") -> None:
    """Print text wrapped between words, never inside one; its first `styled` characters in a style."""
    from rich.text import Text

    lines = textwrap.fill(
        printable(text),
        console.width,
        initial_indent=indent,
        subsequent_indent=2 * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    shown = Text(lines)
    shown.stylize(style, 0, styled)
    console.print(shown, soft_wrap=True)


def print_table(console: "Console", columns: Sequence[Column], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print a table, without rules where the terminal is too narrow for them, or where it is for a table, a list.

    Args:
        console: where to.
        columns: what stands in each.
        rows: cells as plain text.
        title: above it.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = ruled = _widths(columns, cells, console.width - RULED * len(columns) - 1)
    if ruled is None:
        widths = _widths(columns, cells, console.width - PLAIN * (len(columns) - 1))
    if widths is None:
        _print_list(console, columns, cells, title)
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    style: dict[str, Any] = {}
    if ruled is None:
        # what stands between two columns is one of the blanks
        style = {"box": box.SIMPLE_HEAD, "show_edge": False, "pad_edge": False, "padding": (0, PLAIN - 1, 0, 0)}
    table = Table(title=Text(title) if title else None, title_justify="left", **style)
    for column, width in zip(columns, widths, strict=True):
        justify: Literal["right", "left"] = "right" if column.kind == "number" else "left"
        table.add_column(Text(column.head), justify=justify, overflow="fold", width=width)
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def _widths(columns: Sequence[Column], cells: list[list[str]], room: int) -> list[int] | None:
    """Widths of the columns that keep whole what has to be, or None where there is not the room."""
    widths, of_cells, of_all = [], [], []
    for index, column in enumerate(columns):
        texts = [row[index] for row in cells]
        longest, word, head = (max(map(len, each), default=0) for each in (texts, _words(texts), _words([column.head])))
        least = {"prose": max(word, head), "name": min(max(word, head), SHORTEST_FOLD)}
        widths.append(least.get(column.kind, max(longest, head)))
        of_cells.append(max(longest, widths[-1]))
        of_all.append(max(of_cells[-1], len(column.head)))
    if sum(widths) > room:
        return None
    # what is left goes a character at a time to the column that has the most lines: of cells, and then of heads
    for most in (of_cells, of_all):
        wanting = [index for index, width in enumerate(widths) if width < most[index]]
        for _ in range(min(room, sum(most)) - sum(widths)):
            index = max(wanting, key=lambda i: most[i] / widths[i])
            widths[index] += 1
            wanting = [i for i in wanting if widths[i] < most[i]]
    return widths


def _words(texts: Sequence[str]) -> list[str]:
    return [word for text in texts for word in text.split()]


def _print_list(console: "Console", columns: Sequence[Column], cells: list[list[str]], title: str) -> None:
    above = title or columns[0].head
    print_text(console, above, styled=len(above))
    for first, *rest in cells:
        print_text(console, first)
        for column, cell in zip(columns[1:], rest, strict=True):
            if cell:
                print_text(console, f"{column.head}: {cell}", indent="  ")
