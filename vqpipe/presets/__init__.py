"""The experiments that come with vqpipe: one TOML file each, in this folder.

The head comment of a preset has one `# key: value` line each for `what` it trains, the `paper` and the `row` of its
table, the `command`, the numbers `expected` and the `protocol` that measures them, and `notes` on what differs from the
paper or is not in it. Presets without a paper lack `paper`, `row` and `protocol`; `notes` are optional.
With `extends = "NAME"` at its top, a preset holds only what differs from another one.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vqpipe.config import nearest_name, read_toml
from vqpipe.errors import ConfigError

FOLDER = Path(__file__).parent


def names(section: str = "") -> list[str]:
    """The names of all presets, sorted; or of those with a section: "model", "generator" or "classifier"."""
    found = sorted(path.stem for path in FOLDER.glob("*.toml"))
    return [name for name in found if not section or any(section in table for table in chain(name))]


def find(preset: str, folder: Path | None = None) -> Path:
    """The file of a preset's name; a name that ends in `.toml` is a path, relative to `folder`.

    Raises:
        ConfigError: no preset has that name.
    """
    if preset.endswith(".toml"):
        return (folder or Path()) / preset
    path = FOLDER / f"{preset}.toml"
    if preset not in (known := names()):
        nearest = nearest_name(preset, known)
        hint = nearest if nearest.endswith("?") else "vqpipe presets lists all; a file's name ends in .toml"
        raise ConfigError(f"no preset is called {preset!r}", hint)
    return path


def chain(preset: str) -> list[dict[str, Any]]:
    """The tables of a preset and of those that it extends, the last of these first: each changes the ones before.

    Raises:
        ConfigError: no such preset or file, a file that is not TOML, or presets that extend each other.
    """
    tables: list[dict[str, Any]] = []
    seen: list[Path] = []
    name: Any = preset
    folder = None
    while name is not None:
        if not isinstance(name, str):
            raise ConfigError(f"{seen[-1]}: extends = {name!r} should be text", "Give the name of one preset")
        path = find(name, folder)
        table = read_toml(path, "Name a preset (vqpipe presets lists them) or a TOML file")
        if path.resolve() in seen:
            raise ConfigError(f"preset {preset} extends itself through {path.stem}", "Remove one `extends`")
        seen.append(path.resolve())
        tables.insert(0, table)
        name, folder = table.pop("extends", None), path.parent
    return tables


def heads() -> Iterator[tuple[str, dict[str, str]]]:
    """The name and the head comment of each preset."""
    for name in names():
        yield name, read_head(FOLDER / f"{name}.toml")


def estimates() -> dict[str, dict[str, Any]]:
    """What `vqpipe plan presets --json` printed: preset -> machine ("1 x 24 GB", "1 x 80 GB", "8 x 80 GB") ->
    `memory_gib`, of one device in GiB, and `hours`, with `accumulate` and `activation_checkpointing`, with which
    it fits; or None where it does not."""
    path = FOLDER / "estimates.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def read_head(path: Path) -> dict[str, str]:
    """The `# key: value` lines at the head of a preset; a line without a key continues the one before."""
    head: dict[str, str] = {}
    key = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        label, colon, value = line[1:].strip().partition(": ")
        if colon and label.isidentifier():
            key, head[label] = label, value
        elif key:
            head[key] += " " + line[1:].strip()
    return head
