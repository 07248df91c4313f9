"""`vqpipe train-generator`: tokens, or images that are encoded as latents once, and their tokenizer -> generator."""

from pathlib import Path
from typing import Annotated

import typer

from stages import console, recipe, signals
from stages.console import Device, ImageSize, NumWorkers, Out, Preset, Seed, Set
from vqpipe.artifacts import Artifact, open_artifact
from vqpipe.config import class_for
from vqpipe.data.images import open_images
from vqpipe.errors import ConfigError, DataError
from vqpipe.generation import Generator
from vqpipe.generation.latents import encode_latents
from vqpipe.generation.train import (
    RunContext,
    StoredExamples,
    check_validation,
    start_examples_run,
)
from vqpipe.generation.train import train_generator as train
from vqpipe.tokenizer import Tokenizer
from vqpipe.training.loggers import check_loggers


def train_generator(
    tokenizer: console.ExamplesTokenizer,
    out: Out,
    tokens: Annotated[
        Path | None, typer.Option("--tokens", help="A tokens artifact, for gpt and llamagen.", metavar="DIR")
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(
            "--images",
            help="Images, for ldm, dit and sit, in any form that vqpipe train takes; repeatable.",
            metavar="WHERE",
        ),
    ] = None,
    latents: Annotated[
        Path | None,
        typer.Option(
            "--latents",
            help="Latents of --images: read if they exist, else written; default: OUT.latents.",
            metavar="DIR",
        ),
    ] = None,
    steps: console.Steps = None,
    global_batch_size: console.GlobalBatchSize = None,
    precision: console.TrainPrecision = None,
    validation: console.HeldOutExamples = None,
    image_size: ImageSize = None,
    num_workers: NumWorkers = -1,
    log: console.Log = None,
    preset: Preset = None,
    overrides: Set = None,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Train a generator on tokens or latents.

    Run the same command again to resume.

    gpt and llamagen are trained on tokens: --tokens, from vqpipe tokenize.
    ldm, dit and sit are trained on latents: --images, encoded once into an
    artifact of their own, which other runs can read with --latents alone.

    To watch a run, open OUT.partial/report.html. For a validation loss, name
    tokens (or latents) of other images with --validation, or hold some out:
    --set examples.held_out=1000; train.validate_every sets how often.

    The generator includes its tokenizer: vqpipe generate needs nothing else.
    """
    with console.session(device, seed) as torch_device:
        if preset is None:
            raise ConfigError("no preset was named", "Choose one from `vqpipe presets`, such as --preset gpt-tiny")
        check_loggers(log or [])
        flags = {"steps": steps, "global_batch_size": global_batch_size, "precision": precision}
        settings = recipe.load_generator(preset, overrides, train=flags)
        check_validation(settings, validation)
        opened = Tokenizer.from_pretrained(tokenizer, torch_device)
        if class_for(Generator, settings.generator).trained_on == "tokens":  # type: ignore[type-abstract]
            if tokens is None or images or latents:
                what = "no tokens were named" if tokens is None else "--images and --latents are for ldm, dit and sit"
                raise ConfigError(
                    f"this generator is trained on tokens: {what}", "Make them with vqpipe tokenize, and give --tokens"
                )
            stored = open_artifact(tokens, "tokens")
        else:
            if tokens is not None or not (images or latents):
                what = "--tokens is for gpt and llamagen" if tokens is not None else "no images were named"
                raise ConfigError(
                    f"this generator is trained on latents: {what}", "Give --images, or the --latents of another run"
                )
            if images:
                target = latents or out.with_name(f"{out.name}.latents")
                stored = encode(images, target, opened, image_size, settings.examples.mirror, num_workers)
            else:
                assert latents is not None
                stored = open_artifact(latents, "latents")
        examples = StoredExamples(
            opened, stored, None if validation is None else open_artifact(validation, stored.kind)
        )
        draft = start_examples_run(out, settings, examples, seed)
        if isinstance(draft, Artifact):
            return console.finished(draft, again=True)
        with draft, signals.StopAfterStep() as stop, console.ProgressBar() as progress:
            context = RunContext(
                draft=draft,
                stored=examples,
                seed=seed,
                device=torch_device,
                loggers=list(dict.fromkeys(log or [])),
                progress=progress,
                stop_requested=stop.requested,
            )
            artifact = train(context, settings)
            if artifact is None:
                stop.exit()
        return console.finished(artifact)


def encode(
    images: list[str], target: Path, tokenizer: Tokenizer, image_size: int | None, flip: bool, num_workers: int
) -> Artifact:
    """Encode images into the latents artifact `target`."""
    size = image_size or tokenizer.image_size
    if size is None:
        raise DataError("this tokenizer does not have a fixed image size", "Give --image-size")
    with console.ProgressBar() as progress:
        return encode_latents(
            target,
            open_images(images),
            tokenizer,
            image_size=size,
            flip=flip,
            num_workers=num_workers,
            progress=progress,
        )
