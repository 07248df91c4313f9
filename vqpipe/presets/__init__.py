"""The experiments that come with vqpipe: one TOML file each, here beside this file.

A preset's head comment gives `what`, `paper`, `row`, `command` and `expected`, one `# key: value` line each.
"""

from collections.abc import Iterator
from pathlib import Path

from vqpipe.config import nearest_name, read_toml
from vqpipe.errors import ConfigError

FOLDER = Path(__file__).parent


def names(section: str = "") -> list[str]:
    """The names of all presets, sorted; or of those with a section: "model", "generator" or "classifier"."""
    paths = sorted(FOLDER.glob("*.toml"), key=lambda path: path.stem)
    return [path.stem for path in paths if not section or section in read_toml(path)]


def find(preset: str) -> Path:
    """The file of a preset's name; a path that ends in `.toml` stands for itself.

    Raises:
        ConfigError: no preset has that name.
    """
    if preset.endswith(".toml"):
        return Path(preset)
    if preset not in names():
        raise ConfigError(f"no preset is called {preset!r}", nearest_name(preset, names()))
    return FOLDER / f"{preset}.toml"


def heads() -> Iterator[tuple[str, dict[str, str]]]:
    """Each preset's name and its head comment."""
    for name in names():
        yield name, read_head(FOLDER / f"{name}.toml")


def read_head(path: Path) -> dict[str, str]:
    """The `# key: value` lines at the head of a preset; a line without a key goes on with the one before."""
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
