"""A preset as one dataclass, a section per stage.

A preset is a TOML file, one per experiment, in `vqpipe/presets/`. Precedence: a field's default, then the preset, then
`--set`, then a named flag. A stage reads its own sections only, so changing `[train]` leaves features valid.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vqpipe import config, presets
from vqpipe.codebooks.features import FeaturesConfig
from vqpipe.codebooks.kmeans import KmeansConfig
from vqpipe.data.transforms import DataConfig
from vqpipe.losses.objective import ObjectiveConfig
from vqpipe.metrics import EvalConfig
from vqpipe.models.autoencoder import AutoencoderConfig
from vqpipe.models.discriminator import DiscriminatorConfig
from vqpipe.training.config import TrainConfig

PAPER = "vqgan-lc-f16-100k"
"""Gives [model] and [objective], which have no defaults, to a stage that is run without a preset and reads neither."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every setting of one experiment."""

    model: AutoencoderConfig
    objective: ObjectiveConfig
    data: DataConfig = field(default_factory=DataConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    kmeans: KmeansConfig = field(default_factory=KmeansConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def load(preset: str | None, overrides: list[str] | None = None, **flags: Mapping[str, Any]) -> Recipe:
    """Read a preset by name or path (none: every section's defaults), apply `--set` assignments, then named flags.

    `flags` gives a section the values of its flags, `train={"steps": steps}`; None is a flag that was not given.

    Raises:
        ConfigError: no such preset, an unknown key, or a value of the wrong type.
    """
    table = config.read_toml(presets.find(preset or PAPER))
    if preset is None:
        table = {name: table[name] for name in ("model", "objective")}
    table = config.override(Recipe, table, overrides or [])
    for section, values in flags.items():
        table.setdefault(section, {}).update({key: value for key, value in values.items() if value is not None})
    return config.from_table(Recipe, table)
