"""The log of a run, one JSON object a line: what `metrics.jsonl` holds, readable while it grows."""

import json
from pathlib import Path
from typing import Any

from vqpipe import distributed

Row = dict[str, Any]


class History:
    """`metrics.jsonl` of a run. Rank 0 writes; a resumed run first drops the rows that it will write again."""

    def __init__(self, path: Path, resumed_at: int) -> None:
        self.path = path
        if distributed.is_main():
            rows = [row for row in read_history(path) if row["step"] <= resumed_at]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def append(self, row: Row) -> None:
        """Add one row."""
        if distributed.is_main():
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def read_history(path: Path) -> list[Row]:
    """The rows of a log; a last line that was cut short is left out. No file, no rows."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
