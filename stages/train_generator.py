"""`vqpipe train-generator`: tokens, or images that are encoded as latents once, and their tokenizer -> generator."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from stages import console, options
from stages.options import Device, ImageSize, Limit, NumWorkers, Out, Preset, Seed, Set
from vqpipe.errors import ConfigError, DataError


def train_generator(
    tokenizer: options.ExamplesTokenizer,
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
    steps: options.Steps = None,
    global_batch_size: options.GlobalBatchSize = None,
    precision: options.TrainPrecision = None,
    validation: options.ValidationExamples = None,
    limit: Limit = None,
    image_size: ImageSize = None,
    num_workers: NumWorkers = -1,
    max_skipped: options.MaxSkipped = 0.01,
    log: options.Log = None,
    plan: options.Plan = False,
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

    `vqpipe settings train-generator` lists all settings, for presets and --set.
    --set train.schedule=constant|linear|cosine chooses the learning-rate
    schedule after the warm-up; --set generator.head=linear, for llamagen and
    tokenizers with one group, LlamaGen's own output layer.

    To watch a run, open OUT.partial/report.html. For a validation loss, name
    tokens (or latents) of other images with --validation, or hold some out:
    --set examples.held_out=1000; train.validate_every sets how often.

    The generator includes its tokenizer: vqpipe generate needs nothing else.
    """
    options.check_images(images or [])  # before PyTorch is loaded
    options.check_artifacts(tokenizer, *(() if plan else (tokens, validation, None if images else latents)))
    with console.ProgressBar() as progress, console.session(device, seed) as torch_device:
        from stages import estimates, training_run
        from stages.recipe import load_generator
        from vqpipe.artifacts import open_artifact
        from vqpipe.config import class_for
        from vqpipe.data.examples import check_held_out
        from vqpipe.generation.base import Generator
        from vqpipe.generation.latents import encode_latents
        from vqpipe.generation.train import StoredExamples, check_validation, start_examples_run
        from vqpipe.generation.train import train_generator as train
        from vqpipe.planning.estimate import generator_training
        from vqpipe.tokenizer import Tokenizer
        from vqpipe.training.loggers import installed_loggers

        flags = {"steps": steps, "global_batch_size": global_batch_size, "precision": precision}
        notes: list[str] = []
        recipe, loggers = load_generator(preset, overrides, say=notes.append, train=flags), installed_loggers(log)
        check_validation(recipe, validation)
        trained_on = class_for(Generator, recipe.generator).trained_on  # type: ignore[type-abstract]
        path = examples_path(trained_on, tokens=tokens, images=images, latents=latents, out=out)
        opened = Tokenizer.from_pretrained(tokenizer, torch_device)
        if plan:
            side = image_size or opened.image_size or 256
            if path.exists():
                side = StoredExamples(opened, open_artifact(path, trained_on)).image_size
            training = generator_training(recipe, opened.autoencoder.config, side)
            console.say(*notes)
            return estimates.show(estimates.plan_here(training, torch_device))
        held_out = None if validation is None else open_artifact(validation, trained_on)
        if images:
            size = image_size or opened.image_size
            if size is None:
                raise DataError("this tokenizer does not have a fixed image size", "Give --image-size")
            image_set = console.open_images(images, limit=limit)
            limit = None  # the latents are those of the first images
            if (image_set.labels < 0).mean() > max_skipped:  # more than could be left out as unreadable
                recipe.examples.num_classes_of(image_set.labels, image_set.unlabeled)
            stored = encode_latents(
                path,
                image_set,
                opened,
                image_size=size,
                flip=recipe.examples.mirror,
                num_workers=num_workers,
                max_skipped=max_skipped,
                progress=progress,
            )
        else:
            stored = open_artifact(path, trained_on)
        examples = StoredExamples(opened, stored, held_out, limit)
        if image_size not in (None, examples.image_size):
            raise ConfigError(
                f"--image-size {image_size} is not the size of the images in {stored.path}, {examples.image_size}",
                "Omit it, or encode the images at this size",
            )
        check_held_out(recipe.examples.held_out, examples.num_images)  # before the estimate
        console.say(*notes)
        training = generator_training(recipe, opened.autoencoder.config, examples.image_size)
        estimates.check_fits(training, torch_device, out, progress)
        draft = start_examples_run(out, recipe, examples, seed)
        return training_run.run(
            draft,
            lambda run: train(run, recipe, examples),
            seed=seed,
            device=torch_device,
            loggers=loggers,
            progress=progress,
        )


def examples_path(
    trained_on: Literal["tokens", "latents"],
    *,
    tokens: Path | None,
    images: list[str] | None,
    latents: Path | None,
    out: Path,
) -> Path:
    """Return the artifact of tokens or latents to train on; with `images` the one to encode them into.

    Raises:
        ConfigError: the options do not name it, or name examples of the other kind.
    """
    from vqpipe.generation.base import kinds_trained_on

    others = ", ".join(kinds_trained_on("latents" if trained_on == "tokens" else "tokens"))
    if trained_on == "tokens":
        if images or latents:
            raise ConfigError(
                f"this generator is trained on tokens: --images and --latents are for {others}", "Give --tokens"
            )
        if tokens is None:
            raise ConfigError(
                "this generator is trained on tokens: no tokens were named",
                "Make them with vqpipe tokenize, and give --tokens",
            )
        return tokens
    if tokens is not None:
        raise ConfigError(
            f"this generator is trained on latents: --tokens is for {others}", "Give --images or --latents"
        )
    if not images and latents is None:
        raise ConfigError(
            "this generator is trained on latents: no images were named",
            "Give --images, or the --latents of another run",
        )
    return latents or out.with_name(f"{out.name}.latents")
