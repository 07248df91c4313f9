"""What to do after a command: the page or picture to open, and commands with their paths filled in.

Paths that the artifact itself does not name are read from the commands in the provenance of what it was made from.
"""

import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from pyarrow import ArrowException, parquet

from stages.cli import COMMANDS, load
from vqpipe.artifacts import Artifact, open_artifact
from vqpipe.device import bf16_is_faster
from vqpipe.errors import VqpipeError
from vqpipe.files import partial_path
from vqpipe.provenance import stage_command

VECTORS_PER_CODE = 10
"""Vectors per code of the proposed codebook, where there are too few for the default number of codes."""
CODEBOOK_PRESET = "small"
"""A preset whose quantizer takes a codebook."""
TINY_STEPS, TINY_WORK = 1000, 64 * 4096
"""Steps of the tiny presets of generators, and ids x codes for which they take minutes on a CPU."""
FEWEST_STEPS = 100
"""Steps of a proposed generator, at least."""
COMPARED = ("protocol", "image_size", "num_images")
"""Facts of reports that are equal where their numbers share a table."""
MOST_FILES = 8
"""Files of a proposed command, at most."""
PHOTOS, BUILTIN = "builtin:photos", "builtin:photos-f8"
"""Images and a tokenizer that are on every machine."""


def lines(artifact: Artifact) -> list[str]:
    """The lines to print after a command has published the artifact; none for a step of `vqpipe demo`."""
    if command_of(artifact)[:1] not in [[name] for name in COMMANDS if name != "demo"]:
        return []
    files = artifact.names()
    to_open = [artifact.path / name for name in files if name == "report.html" or name.endswith(".png")]
    to_open.sort(key=lambda path: path.suffix == ".png")
    imports = with_name("--import", artifact.options("--import"))
    commands = [shlex.join(map(str, [*words, *imports])) for words in steps(artifact)]
    labels = ["next: ", *["  or: "] * len(commands)]
    return [f"open: {path}" for path in to_open[:1]] + [
        f"{label}{text}" for label, text in zip(labels, commands, strict=False)
    ]


def steps(artifact: Artifact) -> Iterator[Sequence[str | Path]]:
    """The commands that read the artifact, most useful first."""
    path, command = artifact.path, command_of(artifact)[0]
    inputs: list[str | Path]
    match artifact.kind:
        case "dataset":
            yield "vqpipe", "extract-features", "--images", path, "--out", beside(path, "features")
        case "features":
            settings = [*with_name("--preset", options(artifact, "--preset")[:1]), *num_codes(artifact)]
            yield "vqpipe", "kmeans", "--features", path, *settings, "--out", beside(path, "codebook")
        case "codebook":
            named = [name for name in found(artifact, "--preset") if takes_codebook_of(name)]
            preset = [*named, CODEBOOK_PRESET][0]
            settings = ["--preset", preset, *with_name("--precision", [train_precision(preset) or ""])]
            inputs = [*images_of(artifact), "--codebook", path]
            yield "vqpipe", "train", *settings, *inputs, "--out", beside(path, "tokenizer")
        case "tokenizer":
            held_out = with_name("--images", options(artifact, "--validation") or [PHOTOS])
            yield "vqpipe", "eval", *held_out, "--tokenizer", path, "--out", beside(path, "report")
            images = images_of(artifact, PHOTOS)
            yield "vqpipe", "tokenize", *images, "--tokenizer", path, "--out", beside(path, "tokens")
        case "autoencoder":
            yield "vqpipe", "eval", "--images", PHOTOS, "--tokenizer", path, "--out", beside(path, "report")
        case "tokens":
            network = "gpt-tiny" if has_labels(artifact) else "gpt-unconditional-tiny"
            inputs = ["--tokens", path, "--tokenizer", [*options(artifact, "--tokenizer"), "TOKENIZER"][0]]
            yield "vqpipe", "detokenize", *inputs, "--as", "png", "--out", beside(path, "decoded")
            if isinstance(artifact.facts.get("image_size"), int):  # generators are trained on squares of one size
                settings = ["--preset", network, *generator_steps(artifact)]
                yield "vqpipe", "train-generator", *settings, *inputs, "--out", beside(path, "generator")
        case "generator":
            yield "vqpipe", "generate", "--generator", path, "--out", beside(path, "samples")
        case "images" if command == "generate":
            reference = with_name("--reference", images_of(artifact)[1::2])
            yield "vqpipe", "eval-generation", "--images", path, *reference, "--out", beside(path, "samples-report")
        case "images" if command in ("detokenize", "reconstruct"):
            images = files_of(artifact) if command == "reconstruct" else images_again(artifact)
            tokenizer = with_name("--tokenizer", options(artifact, "--tokenizer"))
            yield "vqpipe", "eval", *(images or ["--images", PHOTOS]), *tokenizer, "--out", beside(path, "report")
        case "report" if command == "eval":
            yield from tokenize_more(path, options(artifact, "--tokenizer"))
            if others := other_reports(artifact):
                yield "vqpipe", "compare", path, *others, "--out", beside(path, "comparison")
            elif BUILTIN not in options(artifact, "--tokenizer"):
                same = [word for name in ("--protocol", "--limit") for word in with_name(name, artifact.options(name))]
                same += [*images_of(artifact), "--image-size", str(artifact.facts["image_size"])]
                yield "vqpipe", "eval", *same, "--tokenizer", BUILTIN, "--out", beside(path, f"{path.name}-photos-f8")
        case "report" if command == "compare":
            reports = sorted(reports_of(map(Path, arguments(artifact))), key=lambda each: -each.facts["psnr"])
            yield from tokenize_more(path, [name for each in reports for name in options(each, "--tokenizer")][:1])


def tokenize_more(path: Path, tokenizers: Sequence[str]) -> Iterator[Sequence[str | Path]]:
    """The command that tokenizes the training images of a tokenizer, if they are known."""
    for tokenizer in tokenizers:
        with suppress(VqpipeError):
            if images := with_name("--images", found(open_artifact(Path(tokenizer), "tokenizer"), "--images")):
                yield "vqpipe", "tokenize", *images, "--tokenizer", tokenizer, "--out", beside(path, "tokens")


def other_reports(report: Artifact) -> list[Path]:
    """The reports beside this one that measure other tokenizers on the same images, in the same way."""
    beside_it = reports_of(file.parent for file in sorted(report.path.absolute().parent.glob("*/manifest.json")))

    def measured(each: Artifact) -> list[Any]:
        return [each.inputs.get("images"), *(each.facts.get(key) for key in COMPARED)]

    same = [each for each in beside_it if measured(each) == measured(report)]
    others = [each for each in same if each.inputs.get("tokenizer") != report.inputs.get("tokenizer")]
    return [report.path.with_name(each.path.name) for each in others]


def reports_of(paths: Iterable[Path]) -> Iterator[Artifact]:
    """Those of these paths that are reports of tokenizers."""
    for path in paths:
        with suppress(VqpipeError):
            if "psnr" in (report := open_artifact(path, "report")).facts and command_of(report)[:1] == ["eval"]:
                yield report


def files_of(artifact: Artifact) -> list[str]:
    """`--images` and --limit of the files that `vqpipe reconstruct` read, which all are images; empty where they are
    too many to write out, or are in a folder that holds the artifact: its images are none to measure on."""
    names = arguments(artifact)
    holds = any(Path(name).resolve() in artifact.path.resolve().parents for name in names)
    if holds or len(names) > MOST_FILES or not all(map(is_named, names)):
        return []
    return [*with_name("--images", names), *with_name("--limit", artifact.options("--limit"))]


def images_again(artifact: Artifact) -> list[str]:
    """The options with which `vqpipe eval` reads the images of tokens again, also where some of them are damaged."""
    for name in options(artifact, "--tokens"):
        with suppress(VqpipeError):
            tokens = open_artifact(Path(name), "tokens")
            images = with_name("--images", options(tokens, "--images"))
            same = [word for each in ("--limit", "--color") for word in with_name(each, tokens.options(each))]
            damaged = [f"eval.max_skipped={tokens.config.get('max_skipped', 1)}"] if tokens.facts.get("skipped") else []
            return [*images, *same, *with_name("--set", damaged)] if images else []
    return []


def arguments(artifact: Artifact) -> list[str]:
    """The words of the command that made the artifact that are neither options nor their values."""
    words = command_of(artifact)
    flags = {name for option in load(words[0]).params if getattr(option, "is_flag", False) for name in option.opts}
    takes_no_value = [not word.startswith("-") or "=" in word or word in flags for word in words]
    return [word for word, free in zip(words[1:], takes_no_value, strict=False) if free and not word.startswith("-")]


def command_of(artifact: Artifact) -> list[str]:
    """The command that made the artifact, from its name on."""
    return stage_command(["vqpipe", *artifact.command])


def options(artifact: Artifact, name: str) -> list[str]:
    """The values of an option in the command that made the artifact, without paths that do not exist from here."""
    usable = is_preset if name == "--preset" else is_named
    return list(filter(usable, artifact.options(name)))


def is_named(value: str) -> bool:
    """Whether a name of images or of an artifact can be used from this folder, as far as can be seen at once."""
    return any(mark in value for mark in (":", "*", "{", "?")) or Path(value).exists()


def is_preset(value: str) -> bool:
    """Whether a preset of a tokenizer can be read from this folder."""
    from stages import recipe

    try:
        recipe.load(value)
    except VqpipeError:
        return False
    return True


def found(artifact: Artifact, name: str) -> list[str]:
    """The values of an option in the command that made the artifact, else in those that made what it was made from."""
    if values := options(artifact, name):
        return values
    for role in ("--features", "--codebook", "--tokens", "--latents", "--generator", "--tokenizer"):
        for source in options(artifact, role):
            with suppress(VqpipeError):
                if values := found(open_artifact(Path(source)), name):
                    return values
    return []


def images_of(artifact: Artifact, default: str = "IMAGES") -> list[str]:
    """`--images` of the images that the artifact was made from."""
    return with_name("--images", found(artifact, "--images") or [default])


def with_name(name: str, values: Sequence[str]) -> list[str]:
    """An option with each of its values; an empty value is none."""
    return [word for value in values if value for word in (name, value)]


def has_labels(tokens: Artifact) -> bool:
    """Whether every image has a label, as far as the files can be read."""
    labels = (parquet.read_table(tokens.file(name), columns=["label"]) for name in tokens.names("tokens-*.parquet"))
    with suppress(ArrowException, OSError):
        return all(not table["label"].null_count for table in labels)
    return True


def generator_steps(tokens: Artifact) -> list[str]:
    """`--steps` with which a tiny generator takes minutes on a CPU, where the preset's number would take hours: the
    time of a step grows with ids x codes."""
    work = int(tokens.facts["num_tokens"]) * int(tokens.facts["codebook_size"])
    if torch.cuda.is_available() or work <= 2 * TINY_WORK:
        return []
    return ["--steps", str(max(FEWEST_STEPS, TINY_STEPS * TINY_WORK // work))]


def num_codes(features: Artifact) -> list[str]:
    """`--k` for features that are too few for the number of codes that `vqpipe kmeans` would make of them."""
    from stages import recipe  # here, since it imports most of the library

    preset, vectors = [*options(features, "--preset"), None][0], features.facts["num_vectors"]
    codes = recipe.load(preset).kmeans.k
    return ["--k", str(max(1, vectors // VECTORS_PER_CODE))] if vectors < 2 * codes else []


def takes_codebook_of(preset: str) -> bool:
    """Whether the quantizer of a preset takes a codebook."""
    from stages import recipe

    return recipe.load(preset).model.quantizer.needs_codebook


def train_precision(preset: str) -> Literal["fp32"] | None:
    """fp32 for a preset in bf16, on a CPU that computes bf16 no faster, where it may take many times as long; None:
    that of the preset."""
    from stages import recipe

    if recipe.load(preset).train.precision == "fp32" or torch.cuda.is_available():
        return None
    return None if bf16_is_faster(torch.device("cpu")) else "fp32"


def beside(path: Path, name: str) -> Path:
    """A path in the same folder that is not in use: `name`, else `name-2`, ..."""
    tried, number = path.with_name(name), 1
    while tried.exists() or partial_path(tried).exists():
        number += 1
        tried = path.with_name(f"{name}-{number}")
    return tried
