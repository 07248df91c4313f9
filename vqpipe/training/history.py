"""The log of a run, one JSON object a line: what `metrics.jsonl` holds, readable while it grows."""

import json
import os
from pathlib import Path
from typing import Any

from vqpipe import distributed
from vqpipe.files import flush_to_disk

Row = dict[str, Any]


class History:
    """`metrics.jsonl` of a run. Rank 0 writes; a resumed run first drops the rows that it will write again.

    `rows` holds what the file holds, on rank 0.
    """

    def __init__(self, path: Path, resumed_at: int) -> None:
        self.path = path
        self.rows: list[Row] = []
        if distributed.is_main():
            self.rows = [row for row in read_history(path) if row["step"] <= resumed_at]
            temporary = path.with_name(f".writing-{path.name}")
            temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
            flush_to_disk(temporary)
            os.replace(temporary, path)  # a run killed here has the old log or the shortened one, never half of it

    def append(self, row: Row) -> None:
        """Add one row, on disk when this returns: a checkpoint never outlives the rows before it."""
        if distributed.is_main():
            self.rows.append(row)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())


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
