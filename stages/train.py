"""`vqpipe train`: images (and a codebook) -> tokenizer."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from stages import console, options
from stages.options import Device, Images, Limit, Out, Preset, Seed, Set


def train(
    images: Images,
    out: Out,
    codebook: Annotated[
        Path | None,
        typer.Option(
            "--codebook",
            help="A codebook artifact, or a .npy file of shape [K, dim]; for quantizers that need one. Sets K and dim.",
            metavar="DIR|FILE",
        ),
    ] = None,
    steps: options.Steps = None,
    global_batch_size: options.GlobalBatchSize = None,
    precision: options.TrainPrecision = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Start from the weights of this tokenizer (fine-tuning); see above.", metavar="TOKENIZER"
        ),
    ] = None,
    validation: Annotated[
        list[str] | None,
        typer.Option("--validation", help="Held-out images, as in --images; repeatable; see above.", metavar="WHERE"),
    ] = None,
    publish: Annotated[
        Literal["last", "best"],
        typer.Option("--publish", help="Publish the weights of the last step, or of the best validation."),
    ] = "last",
    limit: Limit = None,
    log: options.Log = None,
    plan: options.Plan = False,
    preset: Preset = None,
    overrides: Set = None,
    color: options.ColorOption = "ignore",
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Train a tokenizer.

    Run the same command again to resume.

    Of several --images, each set is drawn from in proportion to its number of
    images. To mix data sets in other shares, give each a weight, in order:
    --images imagenet --images faces --set 'data.set_weights=[3, 1]' draws
    3 of 4 images from the first.

    To watch a run, open OUT.partial/report.html: curves, reconstructions,
    codes in use. It is written again during the run, with new pictures about
    every minute at first, and reloads itself. It is published with the
    tokenizer; all numbers are in metrics.jsonl beside it.

    A preset's warm-up that is longer than --steps is shortened in proportion.

    `vqpipe settings train` lists all settings, for presets and --set. A preset
    of your own begins with a copy: vqpipe presets small > mine.toml

    --set train.schedule=constant|linear|cosine chooses the learning-rate
    schedule after the warm-up of train.warmup_steps.

    With --validation, train.validation_images held-out images are measured
    every train.validate_every steps (by default, with each reconstruction
    grid). The best weights are kept: by LPIPS if the objective has it, else
    by PSNR.

    --from starts from another tokenizer of the same model: a folder, yours or
    imported, hf:OWNER/NAME or builtin:photos-f8; and from its discriminator if
    it has one. Parts of it may be frozen:
    --set 'train.freeze=["encoder"]' keeps the encoder as it is, "codebook" the
    quantizer; both may be named. The second stage of MGVQ is the preset
    mgvq-f16-g4-finetune, --from the tokenizer of the first.
    """
    options.check_images([*images, *(validation or [])])  # before PyTorch is loaded
    options.check_artifacts(source)
    with console.ProgressBar() as progress, console.session(device, seed) as torch_device:
        from stages import estimates, training_run
        from stages.recipe import load_tokenizer
        from vqpipe.codebooks.codebook import codebook_input, load_codebook
        from vqpipe.planning.estimate import tokenizer_training
        from vqpipe.tokenizer import Tokenizer
        from vqpipe.training.loggers import installed_loggers
        from vqpipe.training.tokenizer_run import (
            RunInputs,
            check_codebook_given,
            check_networks,
            check_run,
            start_tokenizer_run,
            train_tokenizer,
        )

        flags = {"steps": steps, "global_batch_size": global_batch_size, "precision": precision}
        # What is missing is said before the settings of the run are checked, and all errors of the settings before the
        # notes on them, and before the images are indexed and hashed, which may take minutes.
        overrides, loggers = overrides or [], installed_loggers(log)
        network_settings = [text for text in overrides if not text.strip().startswith("train.")]
        quantizer = load_tokenizer(preset, network_settings).model.quantizer
        codes = None if codebook is None else load_codebook(codebook)
        opened = None if source is None else Tokenizer.from_pretrained(source)
        if codes is None and opened is None:
            check_codebook_given(quantizer)
        follow = {} if codes is None else quantizer.codebook_settings(*codes.shape)
        sizes = [f"model.quantizer.{name}={value}" for name, value in follow.items()]
        notes: list[str] = []
        recipe = load_tokenizer(preset, [*sizes, *overrides], say=notes.append, train=flags)  # --set has precedence
        training = tokenizer_training(recipe)
        if plan:
            check_networks(recipe, opened, codes)
            console.say(*notes)
            return estimates.show(estimates.plan_here(training, torch_device))
        check_run(recipe, codebook=codes, source=opened, validates=bool(validation), publish=publish)
        console.say(*notes)
        estimates.check_fits(training, torch_device, out, progress)
        inputs = RunInputs(
            images=console.open_images(images, color=color, limit=limit),
            validation=console.open_images(validation, color=color) if validation else None,
            codebook=None if codebook is None else codebook_input(codebook),
            source=opened,
        )
        draft = start_tokenizer_run(out, recipe, inputs, seed=seed, publish=publish)
        return training_run.run(
            draft,
            lambda run: train_tokenizer(run, recipe, inputs, codebook=codes, publish=publish),
            seed=seed,
            device=torch_device,
            loggers=loggers,
            progress=progress,
        )
