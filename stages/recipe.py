"""A preset as one dataclass, a section per stage.

A preset is a TOML file, one per experiment, in `vqpipe/presets/`. Precedence: a field's default, then the preset, then
`--set`, then a named flag. A stage reads its own section only, so changing `[train]` leaves features valid.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vqpipe.codebooks.features import FeaturesConfig
from vqpipe.codebooks.kmeans import KmeansConfig
from vqpipe.data.transforms import DataConfig
from vqpipe.losses.objective import ObjectiveConfig
from vqpipe.models.autoencoder import AutoencoderConfig
from vqpipe.models.discriminator import DiscriminatorConfig
from vqpipe.training.loop import TrainConfig

from vqpipe import config
from vqpipe.errors import ConfigError
from vqpipe.metrics import EvalConfig

FOLDER = Path(config.__file__).parent / "presets"
DEFAULT = "vqgan-lc-f16-100k"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every setting of one experiment."""

    model: AutoencoderConfig
    data: DataConfig = field(default_factory=DataConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    kmeans: KmeansConfig = field(default_factory=KmeansConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def load(preset: str | None, overrides: list[str] | None = None) -> Recipe:
    """Read a preset by name or path (none: the paper's f16 100k) and apply `--set` assignments.

    Raises:
        ConfigError: no such preset, an unknown key, or a value of the wrong type.
    """
    table = config.read_toml(find(preset or DEFAULT))
    sections = [field.name for field in dataclasses.fields(Recipe)]
    return config.from_table(Recipe, config.override(table, overrides or [], sections))


def find(preset: str) -> Path:
    """The file of a preset's name, or the path of a TOML file."""
    if preset.endswith(".toml"):
        return Path(preset)
    path = FOLDER / f"{preset}.toml"
    if not path.is_file():
        raise ConfigError(f"no preset is called {preset!r}", config.nearest_name(preset, names()))
    return path


def names() -> list[str]:
    """The presets that come with vqpipe, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def heads() -> Iterator[tuple[str, dict[str, str]]]:
    """Each preset's name and the `key: value` lines of its head comment (paper, row, command, expected)."""
    for name in names():
        yield name, head(FOLDER / f"{name}.toml")


def head(path: Path) -> dict[str, str]:
    lines: dict[str, str] = {}
    key = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        label, colon, value = line[1:].strip().partition(": ")
        if colon and label.isidentifier():
            key, lines[label] = label, value
        elif key:
            lines[key] += " " + line[1:].strip()
    return lines


def with_flags(section: Any, **flags: Any) -> Any:
    """A section with each named flag that was given (is not None) put in."""
    return dataclasses.replace(section, **{key: value for key, value in flags.items() if value is not None})
