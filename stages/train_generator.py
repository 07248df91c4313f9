"""`vqpipe train-generator`: tokens, or images whose latents are computed once, and their tokenizer -> generator."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stages import console
from stages import examples as shared
from stages.console import Device, ImageSize, NumWorkers, Out, Preset, Seed, Set

if TYPE_CHECKING:
    import torch
    from torch import nn

    from stages.recipe import GeneratorRecipe
    from vqpipe.artifacts import Artifact, Draft
    from vqpipe.data.examples import Examples
    from vqpipe.data.latents import LatentStatistics
    from vqpipe.generation.base import Space
    from vqpipe.tokenizer import Tokenizer
    from vqpipe.training.checkpoint import TrainState

SECTIONS = ("generator", "examples", "train", "generate")
"""What of a preset this stage reads."""
SHEET_IMAGES, SHEET_COLUMNS = 16, 4
"""Samples drawn now and then."""


@dataclass(frozen=True)
class Source:
    """What is trained on: an artifact of tokens or of latents, and perhaps a second one to validate on."""

    artifact: "Artifact"
    validation: "Artifact | None"
    tokenizer: "Tokenizer"

    @property
    def image_size(self) -> int:
        """Side of the images that were encoded, pixels."""
        return int(self.artifact.facts["image_size"])

    def inputs(self) -> dict[str, Any]:
        """By role."""
        found = {self.artifact.kind: self.artifact, "tokenizer": self.tokenizer.source}
        return found if self.validation is None else found | {"validation": self.validation}

    def examples(self, stored: "Artifact", raw: bool, cache: Path) -> "tuple[Examples, LatentStatistics | None]":
        """One of the artifacts as examples, and what its latents are normalised with."""
        from vqpipe.data.examples import LatentExamples, TokenSet
        from vqpipe.data.latents import open_latents

        if stored.kind == "tokens":
            return TokenSet(stored, cache), None
        latents = open_latents(stored.path, raw=raw)
        shards = stored.names("latents-*.npy")  # read as they are: a flipped bit would train on
        with console.ProgressBar() as progress:
            stored.check(shards, progress)
        return LatentExamples(latents), latents.statistics


def train_generator(
    tokenizer: shared.Given,
    out: Out,
    tokens: Annotated[
        Path | None, typer.Option("--tokens", help="A tokens artifact, for gpt and llamagen.", metavar="DIR")
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option("--images", help="Images, for ldm, dit and sit: as in vqpipe train.", metavar="WHERE"),
    ] = None,
    latents: Annotated[
        Path | None, typer.Option("--latents", help="Where their latents are, or go: OUT.latents.", metavar="DIR")
    ] = None,
    preset: Preset = None,
    steps: console.Steps = None,
    global_batch_size: console.GlobalBatchSize = None,
    precision: console.TrainPrecision = None,
    validation: shared.HeldOutTokens = None,
    image_size: ImageSize = None,
    num_workers: NumWorkers = -1,
    log: console.Log = None,
    overrides: Set = None,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Train a generator. Run the same command again to resume it.

    gpt and llamagen learn tokens: --tokens, from vqpipe tokenize. ldm, dit and
    sit learn latents: --images, encoded once into an artifact of their own,
    which other runs can read with --latents alone.

    To watch a run, open OUT.partial/report.html. For a validation loss, name
    tokens (or latents) of other images with --validation, or hold some out:
    --set examples.held_out=1000; train.validate_every says how often.

    The generator carries its tokenizer: vqpipe generate needs nothing else.
    """
    with console.session(device, seed) as where:
        from stages import recipe as recipes
        from vqpipe import artifacts
        from vqpipe.errors import ConfigError
        from vqpipe.tokenizer import Tokenizer
        from vqpipe.training.loggers import check_loggers

        if preset is None:
            raise ConfigError("no preset was named", "Choose one from `vqpipe presets`, such as --preset gpt-tiny")
        check_loggers(log or [])
        flags = {"steps": steps, "global_batch_size": global_batch_size, "precision": precision}
        recipe = recipes.load_generator(preset, overrides, train=flags)
        shared.check_schedule(recipe.train, bool(validation or recipe.examples.held_out))
        opened = Tokenizer.from_pretrained(tokenizer, where)
        if learns(recipe) == "tokens":
            stored = tokens_of(tokens, images, latents, opened)
        else:
            encoder = Encoder(opened, image_size, mirror=recipe.examples.mirror, num_workers=num_workers)
            stored = encoder.latents_of(images, latents, tokens, out)
        held_out = None if validation is None else artifacts.open_artifact(validation, stored.kind)
        if held_out is not None:
            opened.check_made(held_out)
            shared.check_alike(stored, held_out)
        source = Source(stored, held_out, opened)
        request = shared.asked({name: getattr(recipe, name) for name in SECTIONS}, seed)
        draft = artifacts.start(out, "generator", request, source.inputs())
        if isinstance(draft, artifacts.Artifact):
            return console.finished(draft, again=True)
        with draft:
            return console.finished(run(recipe, draft, source, list(dict.fromkeys(log or [])), seed, where))


def learns(recipe: "GeneratorRecipe") -> str:
    """ "tokens" or "latents"."""
    from vqpipe.generation.base import generator_classes

    kinds = {each.config_class: each.trained_on for each in generator_classes() if hasattr(each, "config_class")}
    return kinds[type(recipe.generator)]


def tokens_of(
    tokens: Path | None, images: list[str] | None, latents: Path | None, tokenizer: "Tokenizer"
) -> "Artifact":
    """The tokens that were named.

    Raises:
        ConfigError: none were, or something else.
        ArtifactError: another tokenizer made them.
    """
    from vqpipe.errors import ConfigError

    if tokens is None or images or latents:
        what = "no tokens were named" if tokens is None else "--images and --latents are for ldm, dit and sit"
        raise ConfigError(f"this generator learns tokens: {what}", "Make them with vqpipe tokenize, and give --tokens")
    return shared.open_tokens(tokens, tokenizer)


@dataclass(frozen=True)
class Encoder:
    """How images become latents."""

    tokenizer: "Tokenizer"
    image_size: int | None
    mirror: bool
    num_workers: int

    def latents_of(self, images: list[str] | None, latents: Path | None, tokens: Path | None, out: Path) -> "Artifact":
        """The latents that were named, or those of the images, made now where they are not there yet.

        Raises:
            ConfigError: neither was named, or tokens were.
            ArtifactError: another tokenizer made them, or they are of other images.
        """
        from vqpipe import artifacts
        from vqpipe.errors import ConfigError

        if tokens is not None or not (images or latents):
            what = "it cannot learn tokens" if tokens is not None else "no images were named"
            raise ConfigError(f"this generator learns latents: {what}", "Give --images, or --latents made before")
        if not images:
            assert latents is not None
            stored = artifacts.open_artifact(latents, "latents")
            self.tokenizer.check_made(stored)
            return stored
        return self.encode(images, latents or out.with_name(f"{out.name}.latents"))

    def encode(self, images: list[str], target: Path) -> "Artifact":
        """A latents artifact of these images."""
        from vqpipe import artifacts
        from vqpipe.data.images import open_images
        from vqpipe.data.latents import write_latents
        from vqpipe.errors import DataError

        size = self.image_size or self.tokenizer.image_size
        if size is None:
            raise DataError("this tokenizer does not say at which size it was trained", "Give --image-size")
        image_set = open_images(images)
        config: dict[str, Any] = {"image_size": size, "flip": self.mirror, "precision": "fp32", "max_skipped": 0.01}
        draft = artifacts.start(target, "latents", config, {"images": image_set, "tokenizer": self.tokenizer.source})
        if isinstance(draft, artifacts.Artifact):
            return draft
        with draft, console.ProgressBar() as bar:
            facts = write_latents(
                draft, image_set, self.tokenizer, num_workers=self.num_workers, progress=bar, **config
            )
            made = draft.publish(facts)
        console.say(f"latents: {made.path}")
        return made


def run(
    recipe: "GeneratorRecipe",
    draft: "Draft",
    source: Source,
    loggers: list[str],
    seed: int,
    device: "torch.device",
) -> "Artifact":
    """Build the generator, train it in `draft`, publish."""
    from functools import partial

    import numpy as np
    import torch

    from vqpipe import distributed
    from vqpipe.config import to_table
    from vqpipe.generation.base import Space, build_generator
    from vqpipe.generation.published import PublishedGenerator, draws_of
    from vqpipe.tokenizer import latent_size

    quantizer, size = source.tokenizer.autoencoder.quantizer, source.image_size
    everything, statistics = source.examples(source.artifact, recipe.examples.raw, draft.path)
    others = None
    if source.validation is not None:
        others, _ = source.examples(source.validation, recipe.examples.raw, draft.path)
    examples, held_out = shared.split(everything, recipe.examples, others, recipe.train.validation_images)
    num_classes = recipe.examples.classes_of(everything.labels)
    space = Space.of(quantizer, *latent_size(size, size, source.tokenizer.downsample_factor), num_classes)
    torch.manual_seed(seed)  # what was read or encoded before may have drawn random numbers
    generator = build_generator(recipe.generator, space).to(device)
    if generator.needs_codebook:
        generator.load_codebook(quantizer.all_codes())
    published = PublishedGenerator(
        generator=generator,
        tokenizer=source.tokenizer,
        image_size=size,
        classes=() if num_classes is None else tuple(np.unique(examples.labels).tolist()),
        sampling=recipe.generate,
        statistics=statistics,
    )
    published.draw(
        torch.zeros(1, dtype=torch.int64), recipe.generate, draws_of(seed, range(1))
    )  # can it be sampled so?
    parameters = sum(parameter.numel() for parameter in generator.parameters())
    console.say(f"{recipe.generator.kind}: {parameters:,} parameters, {len(examples):,} images")
    state = shared.learn(
        draft,
        generator.requires_grad_(True),
        examples,
        recipe.train,
        mirror=recipe.examples.mirror,
        seed=seed,
        device=device,
        what=f"{recipe.generator.kind} on {generator.trained_on}, {parameters / 1e6:,.1f} M parameters.",
        validate=None if held_out is None else partial(validated, held_out, recipe, device),
        sample=partial(sheet, published, seed),
        settings={name: to_table(getattr(recipe, name)) for name in SECTIONS},
        loggers=loggers,
    )
    weights = state.published()
    if distributed.is_main():
        save(draft, published, weights)
    return draft.publish(facts_of(recipe, space, state, parameters, draft))


def validated(held_out: "Examples", recipe: "GeneratorRecipe", device: "torch.device", network: "nn.Module") -> Any:
    """The loss on held-out examples."""
    from vqpipe import distributed
    from vqpipe.generation.held_out import held_out_losses

    size = recipe.train.share(distributed.world_size()) // recipe.train.accumulate
    return held_out_losses(network, held_out, batch_size=size, device=device, precision=recipe.train.precision)


def sheet(published: Any, seed: int, network: Any) -> bytes:
    """A few samples of the weight average, the same seeds and classes each time."""
    import torch

    from vqpipe.generation.published import draw_images, draws_of
    from vqpipe.reports.pictures import contact_sheet

    classes = published.classes or (0,)
    labels = torch.tensor(
        [classes[i * max(1, len(classes) // SHEET_IMAGES) % len(classes)] for i in range(SHEET_IMAGES)]
    )
    images = draw_images(network.eval(), published, labels, published.sampling, draws_of(seed, range(SHEET_IMAGES)))
    return contact_sheet(images, SHEET_COLUMNS)


def save(draft: "Draft", published: Any, weights: "dict[str, torch.Tensor]") -> None:
    """Write the generator's files into the draft."""
    from vqpipe.generation.published import write_generator

    write_generator(draft, published, weights)
    draft.adopt("metrics.jsonl")


def facts_of(
    recipe: "GeneratorRecipe", space: "Space", state: "TrainState", parameters: int, draft: "Draft"
) -> dict[str, Any]:
    """What the manifest says of a generator."""
    from vqpipe.training.callbacks import MetricsLog, read_metrics

    log = MetricsLog(draft.path / "metrics.jsonl")
    log.rows = read_metrics(log.path)
    measured = {"training_loss": log.latest("loss/total"), "valid_loss": log.latest("valid/total")}
    return {
        "kind": recipe.generator.kind,
        "num_parameters": parameters,
        "num_classes": space.num_classes,
        "images_seen": state.images_seen,
        "steps": state.step,
        **{name: value for name, value in measured.items() if value is not None},
    }
