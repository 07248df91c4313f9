"""What is in `<out>.partial`: how far an unfinished artifact is."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqpipe.artifacts import lock
from vqpipe.artifacts.artifact import command_of
from vqpipe.artifacts.draft import STATUS
from vqpipe.artifacts.states import step_of
from vqpipe.errors import ArtifactError
from vqpipe.files import partial_path, read_rows


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """The state of an unfinished artifact."""

    path: Path
    kind: str
    config: dict[str, Any]
    command: str
    """The command of vqpipe that writes it; empty if another program does."""
    files: int
    """Finished files."""
    bytes: int
    counts: dict[str, int]
    """What the finished files hold: `images`, `rows`."""
    states: dict[str, int]
    """Saved states: folder and kind of step (`checkpoints/step`) -> the newest step."""
    logged_step: int | None
    """The last step of metrics.jsonl."""
    error: str
    """The error that ended the last run; empty: none, or it was killed."""
    writer: str
    """The process that is writing it; empty: none is."""


def find_partial(path: Path) -> Path | None:
    """The directory of an unfinished artifact that `path` names, by its own name or that of the artifact."""
    for folder in (path, partial_path(path)):
        if (folder / "request.json").is_file() and not (folder / "manifest.json").exists():
            return folder
    return None


def read_unfinished(folder: Path) -> Unfinished:
    """Read the state of an unfinished artifact; nothing is changed.

    Raises:
        ArtifactError: its request.json or its metrics.jsonl is damaged.
    """
    try:
        request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
        kind, config = str(request["kind"]), dict(request["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"{folder / 'request.json'} is damaged ({type(error).__name__})"
        raise ArtifactError(what, "Run its command with another --out") from None
    records = [table for file in (folder / ".records").glob("*.json") if (table := read_table(file))]
    counts: Counter[str] = Counter()
    for record in records:
        held = record.get("record", {})
        counts.update({key: held[key] for key in ("images", "rows") if isinstance(held.get(key), int)})
    states: dict[str, int] = {}
    for file in folder.rglob("*-*/state.json"):
        saved = file.parent
        if saved.name[0] != "." and saved.name.rpartition("-")[2].isdigit():
            series = (saved.parent / saved.name.rpartition("-")[0]).relative_to(folder).as_posix()
            states[series] = max(step_of(saved), states.get(series, 0))
    rows = read_rows(folder / "metrics.jsonl")
    return Unfinished(
        path=folder,
        kind=kind,
        config=config,
        command=command_of(folder),
        files=len(records),
        bytes=sum(record.get("bytes", 0) for record in records),
        counts=dict(counts),
        states=dict(sorted(states.items())),
        logged_step=rows[-1]["step"] if rows else None,
        error=str(read_table(folder / STATUS).get("error", "")),
        writer=lock.owner(folder),
    )


def read_table(file: Path) -> dict[str, Any]:
    """A JSON object; empty if it is absent or damaged, as while it is being written."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}
