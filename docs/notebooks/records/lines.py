"""A record of runs as JSON lines, which an interrupted script continues."""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


class Lines:
    """The runs of one record, appended one by one.

    Args:
        name: of the file, without its ending.
        keys: fields that tell runs apart.
    """

    def __init__(self, name: str, keys: tuple[str, ...]) -> None:
        self.path, self.keys = FOLDER / f"{name}.jsonl", keys
        lines = self.path.read_text("utf-8").splitlines() if self.path.exists() else []
        self.runs = [json.loads(line) for line in lines]

    def holds(self, **key: Any) -> bool:
        """Say whether there is a run with these keys."""
        return any(all(run[k] == key[k] for k in self.keys) for run in self.runs)

    def append(self, **run: Any) -> None:
        """Add a run, and print it."""
        self.runs.append(run)
        line = json.dumps(run)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)
