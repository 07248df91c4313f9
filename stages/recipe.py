"""Presets as dataclasses, with one section per stage: of a tokenizer, a generator or a classifier.

A preset is a TOML file, one per experiment, in `vqpipe/presets/`. Precedence: a field's default, then the preset, then
`--set`, then a named flag. A stage reads its own sections only, so changing `[train]` leaves features valid.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from vqpipe import config, presets
from vqpipe.codebooks.features import FeaturesConfig
from vqpipe.codebooks.kmeans import KmeansConfig
from vqpipe.data.transforms import DataConfig
from vqpipe.errors import ConfigError
from vqpipe.generation.train import ClassifierRecipe, GeneratorRecipe
from vqpipe.losses.objective import ObjectiveConfig
from vqpipe.metrics import EvalConfig
from vqpipe.models.autoencoder import AutoencoderConfig
from vqpipe.models.discriminator import DiscriminatorConfig
from vqpipe.training.config import TokenizerTrainConfig

PAPER = "vqgan-lc-f16-100k"
"""Gives [model] and [objective], which have no defaults, to a stage that is run without a preset and reads neither."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every setting of a tokenizer."""

    model: AutoencoderConfig
    objective: ObjectiveConfig
    data: DataConfig = field(default_factory=DataConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    kmeans: KmeansConfig = field(default_factory=KmeansConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    train: TokenizerTrainConfig = field(default_factory=TokenizerTrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


R = TypeVar("R", Recipe, GeneratorRecipe, ClassifierRecipe)
SUBJECTS: dict[str, tuple[type, str]] = {
    "model": (Recipe, "vqpipe train"),
    "generator": (GeneratorRecipe, "vqpipe train-generator"),
    "classifier": (ClassifierRecipe, "vqpipe train-classifier"),
}
"""The section that says what a preset is of -> its recipe, and the command that trains by it."""


def load(preset: str | None, overrides: list[str] | None = None, **flags: Mapping[str, Any]) -> Recipe:
    """Read a preset by name or path (none: every section's defaults), apply `--set` assignments, then named flags.

    `flags` gives a section the values of its flags, `train={"steps": steps}`; None is a flag that was not given.

    Raises:
        ConfigError: no such preset, an unknown key, or a value of the wrong type.
    """
    table = config.read_toml(presets.find(preset or PAPER))
    if preset is None:
        table = {name: table[name] for name in ("model", "objective")}
    return read(Recipe, preset or PAPER, table, overrides or [], flags)


def load_generator(preset: str, overrides: list[str] | None = None, **flags: Mapping[str, Any]) -> GeneratorRecipe:
    """The same for a generator's preset."""
    return read(GeneratorRecipe, preset, config.read_toml(presets.find(preset)), overrides or [], flags)


def load_classifier(preset: str, overrides: list[str] | None = None, **flags: Mapping[str, Any]) -> ClassifierRecipe:
    """The same for a classifier's preset."""
    return read(ClassifierRecipe, preset, config.read_toml(presets.find(preset)), overrides or [], flags)


def read(
    cls: type[R], preset: str, table: dict[str, Any], overrides: list[str], flags: Mapping[str, Mapping[str, Any]]
) -> R:
    """A preset's tables as a `cls`; one of another subject is told by its section."""
    for section, (other, command) in SUBJECTS.items():
        if section in table and other is not cls:
            raise ConfigError(f"preset {preset} has a section [{section}]: it is for {command}", "See vqpipe presets")
    table = config.override(cls, table, overrides)
    for name, values in flags.items():
        table.setdefault(name, {}).update({key: value for key, value in values.items() if value is not None})
    return config.from_table(cls, table)
