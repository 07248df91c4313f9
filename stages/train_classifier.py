"""`vqpipe train-classifier`: tokens with labels, their tokenizer -> classifier, with its top-1 on held-out tokens."""

from pathlib import Path
from typing import Annotated

import typer

from stages import console, options
from stages.options import Device, Limit, Out, Preset, Seed, Set


def train_classifier(
    tokens: Annotated[Path, typer.Option("--tokens", help="A tokens artifact, with labels.", metavar="DIR")],
    tokenizer: options.ExamplesTokenizer,
    out: Out,
    steps: options.Steps = None,
    global_batch_size: options.GlobalBatchSize = None,
    precision: options.TrainPrecision = None,
    validation: options.ValidationExamples = None,
    limit: Limit = None,
    log: options.Log = None,
    preset: Preset = None,
    overrides: Set = None,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Train a classifier of tokens.

    Its accuracy measures the class information in the tokens.

    Top-1 and top-5 are measured on tokens that are not trained on: all of
    those named with --validation, else examples.held_out of --tokens. They
    are in metrics.json, with the name of the training recipe, which is ours:
    the paper gives none. vit-b fine-tunes MAE's weights, which it needs:
    --set classifier.weights=mae_pretrain_vit_base.pth
    To train it from scratch: --set classifier.pretrained=false

    `vqpipe settings train-classifier` lists all settings, for presets and --set.

    Run the same command again to resume. To watch a run, open
    OUT.partial/report.html.
    """
    options.check_artifacts(tokens, tokenizer, validation)  # before PyTorch is loaded
    with console.ProgressBar() as progress, console.session(device, seed) as torch_device:
        from stages import training_run
        from stages.recipe import load_classifier
        from vqpipe.artifacts import open_artifact
        from vqpipe.generation.train import StoredExamples, check_validation, start_examples_run
        from vqpipe.generation.train import train_classifier as train
        from vqpipe.tokenizer import Tokenizer
        from vqpipe.training.loggers import installed_loggers

        flags = {"steps": steps, "global_batch_size": global_batch_size, "precision": precision}
        notes: list[str] = []
        recipe, loggers = load_classifier(preset, overrides, say=notes.append, train=flags), installed_loggers(log)
        check_validation(recipe, validation)
        opened = Tokenizer.from_pretrained(tokenizer, torch_device)
        examples = StoredExamples(
            opened,
            open_artifact(tokens, "tokens"),
            None if validation is None else open_artifact(validation, "tokens"),
            limit,
        )
        console.say(*notes)
        draft = start_examples_run(out, recipe, examples, seed)
        training_run.run(
            draft,
            lambda run: train(run, recipe, examples),
            seed=seed,
            device=torch_device,
            loggers=loggers,
            progress=progress,
        )
