"""Tables in hand-written files: what stands between two markers is written by a program."""

from pathlib import Path

END = "<!-- end -->"


def begin(command: str) -> str:
    """Return the marker above a table that this command writes."""
    return f"<!-- begin: written by {command} -->"


def replaced(text: str, command: str, new: str, name: str) -> str:
    """Return a file's text with what stands below this command's marker, up to the next end, replaced.

    Args:
        text: of the file.
        command: in the marker.
        new: lines to put there.
        name: of the file, for the message.
    Raises:
        ValueError: if the markers are not there, in order.
    """
    opening = begin(command)
    before, found, rest = text.partition(f"{opening}\n")
    _, ended, after = rest.partition(END)
    if not found or not ended or opening in rest:
        raise ValueError(f"{name}: want one line {opening} and below it a line {END}")
    return f"{before}{opening}\n{new}\n{END}{after}"


def rewrite(path: Path, command: str, new: str) -> None:
    """Replace in the file itself."""
    path.write_text(replaced(path.read_text(encoding="utf-8"), command, new, path.name), encoding="utf-8")


def row(cells: list[str]) -> str:
    """Return a line of a Markdown table."""
    return f"| {' | '.join(cells)} |"
