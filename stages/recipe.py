"""Presets -> recipes, of a tokenizer, a generator or a classifier.

A preset is a TOML file, one per experiment, in `vqpipe/presets/`. A recipe is a dataclass whose fields are the sections
of a preset. Precedence, lowest first: a field's default, the presets that the preset extends, the preset, `--set`,
named flags. A stage reads only its own sections, so changing `[train]` leaves features valid. A preset may hold them
all; `--set` of a section that the stage does not read is an error.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial, reduce
from itertools import takewhile
from typing import Any, TypeVar

from vqpipe import config, presets
from vqpipe.codebooks.features import FeaturesConfig
from vqpipe.codebooks.kmeans import KmeansConfig
from vqpipe.errors import ConfigError
from vqpipe.generation.train import ClassifierRecipe, GeneratorRecipe
from vqpipe.metrics import EvalConfig
from vqpipe.progress import SILENT
from vqpipe.settings import Setting, describe
from vqpipe.training.config import TrainConfig
from vqpipe.training.tokenizer_run import TokenizerRecipe
from vqpipe.words import counted

PAPER = "vqgan-lc-f16-100k"
"""Preset that fills the required sections [model] and [objective] for commands that run without --preset and do not
read them."""


@dataclass(frozen=True, kw_only=True)
class PipelineRecipe(TokenizerRecipe):
    """All sections of a tokenizer's preset: those of its training, and of the stages before and after it."""

    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    kmeans: KmeansConfig = field(default_factory=KmeansConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


SECTIONS: dict[str, tuple[type, tuple[str, ...]]] = {
    "extract-features": (PipelineRecipe, ("features",)),
    "kmeans": (PipelineRecipe, ("kmeans",)),
    "train": (PipelineRecipe, tuple(each.name for each in fields(TokenizerRecipe))),
    "eval": (PipelineRecipe, ("eval",)),
    "train-generator": (GeneratorRecipe, ("generator", "examples", "train", "generate")),
    "generate": (GeneratorRecipe, ("generate",)),
    "train-classifier": (ClassifierRecipe, ("classifier", "examples", "train")),
}
"""Command -> the recipe and the sections that it reads."""

SHORT = 0.2
"""Share of a preset's steps up to which a run is called a first look."""
Say = Callable[[str], None]
"""Prints a line for the user."""
R = TypeVar("R", PipelineRecipe, GeneratorRecipe, ClassifierRecipe)
RECIPES: dict[type, tuple[str, str, str]] = {
    PipelineRecipe: ("model", "vqpipe train", "small"),
    GeneratorRecipe: ("generator", "vqpipe train-generator", "gpt-tiny"),
    ClassifierRecipe: ("classifier", "vqpipe train-classifier", "vit-tiny"),
}
"""Recipe -> the main section of its presets, the command that trains it, and a small preset to start from."""


def load(
    preset: str | None,
    overrides: list[str] | None = None,
    *,
    reads: Sequence[str] | None = None,
    say: Say = SILENT.message,
    **flags: Mapping[str, Any],
) -> PipelineRecipe:
    """Read a preset by name or path (None: the defaults of every section), apply `--set` assignments, then named flags.

    `reads` names the sections that the command reads; None: all. `flags` gives the values of a section's flags,
    `train={"steps": steps}`; None is a flag that was not given. `say` gets a line where a setting is adapted.

    Raises:
        ConfigError: no such preset, an unknown key, a value of the wrong type, or `--set` of a section not read.
    """
    table = {} if preset is None else resolve(PipelineRecipe, preset)
    for name, settings in resolve(PipelineRecipe, PAPER).items():
        if name in ("model", "objective") and (preset is None or (reads is not None and name not in reads)):
            table.setdefault(name, settings)
    check_sections(PipelineRecipe, overrides or [], reads)
    return read(PipelineRecipe, preset or PAPER, table, overrides or [], flags, say, reads)


def load_tokenizer(
    preset: str | None, overrides: list[str] | None = None, *, say: Say = SILENT.message, **flags: Mapping[str, Any]
) -> TokenizerRecipe:
    """`load` for the sections that `vqpipe train` reads; the preset is required."""
    sections = SECTIONS["train"][1]
    recipe = load(required(PipelineRecipe, preset), overrides, reads=sections, say=say, **flags)
    return TokenizerRecipe(**{name: getattr(recipe, name) for name in sections})


def load_generator(
    preset: str | None, overrides: list[str] | None = None, *, say: Say = SILENT.message, **flags: Mapping[str, Any]
) -> GeneratorRecipe:
    """`load` for a generator's preset, which is required."""
    preset = required(GeneratorRecipe, preset)
    return read(GeneratorRecipe, preset, resolve(GeneratorRecipe, preset), overrides or [], flags, say)


def load_classifier(
    preset: str | None, overrides: list[str] | None = None, *, say: Say = SILENT.message, **flags: Mapping[str, Any]
) -> ClassifierRecipe:
    """`load` for a classifier's preset, which is required."""
    preset = required(ClassifierRecipe, preset)
    return read(ClassifierRecipe, preset, resolve(ClassifierRecipe, preset), overrides or [], flags, say)


def settings_of(command: str) -> list[Setting]:
    """Every setting that a command reads from a preset.

    Raises:
        ConfigError: no command of that name has settings.
    """
    if command not in SECTIONS:
        raise ConfigError(f"{command} reads no preset", config.nearest_name(command, SECTIONS))
    cls, sections = SECTIONS[command]
    return [setting for name in sections for setting in describe(config.section_of(cls, name), name)]


def sets(key: str, preset: str | None, overrides: Sequence[str] | None) -> bool:
    """Whether the preset or a `--set` gives the setting `section.key`, as opposed to its default."""
    section, _, name = key.partition(".")
    in_preset = preset is not None and name in resolve(PipelineRecipe, preset).get(section, {})
    return in_preset or any(text.partition("=")[0].strip() == key for text in overrides or [])


def check_sections(cls: type, overrides: Sequence[str], reads: Sequence[str] | None) -> None:
    """Raise a ConfigError for a `--set` of a section of `cls` that the command does not read."""
    for text in overrides:
        section = text.partition("=")[0].strip().partition(".")[0]
        if reads is not None and section not in reads and section in {each.name for each in fields(cls)}:
            raise ConfigError(
                f"--set {text}: this command does not read the section [{section}]",
                f"It reads {', '.join(f'[{name}]' for name in reads)}",
            )


def required(cls: type, preset: str | None) -> str:
    """Return the preset of the recipe `cls`, or raise a ConfigError if none is named."""
    if preset is None:
        raise ConfigError(
            "no preset was named", f"Choose one from `vqpipe presets`, such as --preset {RECIPES[cls][2]}"
        )
    return preset


def resolve(cls: type, preset: str) -> dict[str, Any]:
    """The tables of a preset of the recipe `cls`, merged with those that it extends."""
    return reduce(partial(config.merge, cls), presets.chain(preset))


def resolved_toml(preset: str) -> str:
    """A preset as TOML: its head, quoted as that of the preset, and its settings merged with those that it extends."""
    sections = {section for table in presets.chain(preset) for section in table}
    cls = next((recipe for recipe, (section, _, _) in RECIPES.items() if section in sections), PipelineRecipe)
    table = resolve(cls, preset)
    config.from_table(cls, table)
    lines = presets.find(preset).read_text(encoding="utf-8").splitlines(keepends=True)
    head = [f"#   {line[1:].lstrip()}" for line in takewhile(lambda line: line.startswith("#"), lines)]
    source = preset if preset.endswith(".toml") else f"the preset {preset}"
    first = f"# Copied from {source}, whose description is:\n" if head else f"# Copied from {source}.\n"
    return "".join([first, *head, "\n", config.to_toml(table)])


def read(
    cls: type[R],
    preset: str,
    table: dict[str, Any],
    overrides: list[str],
    flags: Mapping[str, Mapping[str, Any]],
    say: Say = SILENT.message,
    reads: Sequence[str] | None = None,
) -> R:
    """The tables of a preset as a `cls`; a preset for another command is an error, recognized by its main section."""
    for other, (section, command, _) in RECIPES.items():
        if section in table and other is not cls:
            raise ConfigError(f"preset {preset} has a section [{section}]: it is for {command}", "See vqpipe presets")
    before, table = table.get("train", {}), config.override(cls, table, overrides, reads)
    for name, values in flags.items():
        table.setdefault(name, {}).update({key: value for key, value in values.items() if value is not None})
    if not any(text.partition("=")[0].strip() == "train.warmup_steps" for text in overrides):
        fit_to_steps(before, table.get("train"), say)
    hint = f"vqpipe presets {RECIPES[cls][2]} > mine.toml writes a whole preset to start from"
    return config.from_table(cls, table, hint=hint, reads=reads)


def fit_to_steps(preset: object, train: object, say: Say) -> None:
    """Shorten a preset's warm-up that is longer than the run, in the proportion of the run to the preset's, and say
    that a run is much shorter than the preset's. Values of another type are left as they are: they are errors."""
    if not (isinstance(preset, dict) and isinstance(train, dict)):
        return
    warmup, of, steps = preset.get("warmup_steps"), preset.get("steps", TrainConfig.steps), train.get("steps")
    if not (isinstance(of, int) and isinstance(steps, int) and 0 < steps <= of):
        return
    if steps <= SHORT * of:
        say(f"a first look: {steps:,} of the preset's {of:,} steps, which give much better results")
    if isinstance(warmup, int) and steps < warmup <= of:
        train["warmup_steps"] = shorter = warmup * steps // of
        say(f"warm-up: {counted(shorter, 'steps')} instead of {warmup:,}, in the same proportion")
