"""What train-generator and train-classifier share: the tokens they read, their run, what watches it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stages import console, signals

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vqpipe.artifacts import Artifact, Draft
    from vqpipe.data.examples import Examples, ExamplesConfig
    from vqpipe.tokenizer import Tokenizer
    from vqpipe.training.checkpoint import TrainState
    from vqpipe.training.config import TrainConfig

Given = Annotated[
    Path, typer.Option("--tokenizer", help="The tokenizer that made the tokens, or will make them.", metavar="DIR")
]
HeldOutTokens = Annotated[
    Path | None, typer.Option("--validation", help="Tokens of held-out images; see above.", metavar="DIR")
]


def open_tokens(path: Path, tokenizer: "Tokenizer") -> "Artifact":
    """A tokens artifact that this tokenizer made.

    Raises:
        ArtifactError: another one made it.
    """
    from vqpipe import artifacts

    stored = artifacts.open_artifact(path, "tokens")
    tokenizer.check_made(stored)
    return stored


def check_alike(stored: "Artifact", validation: "Artifact | None") -> None:
    """Raise an ArtifactError where held-out tokens are of another size than those to train on."""
    from vqpipe.errors import ArtifactError

    if validation is None:
        return
    fact, what = ("latent_shape", "shape of latents") if stored.kind == "latents" else ("layout", "layout of ids")
    if validation.facts[fact] != stored.facts[fact]:
        raise ArtifactError(
            f"{validation.path} has another {what} than {stored.path}", "Tokenize both at one image size"
        )


def split(examples: "Examples", config: "ExamplesConfig", validation: "Examples | None", limit: int) -> Any:
    """(what to train on, what to validate on or None): the validation set where one was named, else what is held out.

    Of a set that was named the first `limit` examples are taken while the run goes on.

    Raises:
        ConfigError: both ways at once.
    """
    import numpy as np

    from vqpipe.data.examples import Part, held_out_part
    from vqpipe.errors import ConfigError

    if validation is None:
        return held_out_part(examples, config.held_out)
    if config.held_out:
        raise ConfigError(
            f"examples.held_out = {config.held_out}, and --validation names images", "Set examples.held_out=0"
        )
    spread = np.linspace(0, len(validation) - 1, min(limit, len(validation))).round().astype(np.int64)
    return examples, Part(validation, spread)


def check_schedule(config: "TrainConfig", validates: bool) -> None:
    """Raise a ConfigError where a validation is asked for and there is nothing to validate on."""
    from vqpipe.errors import ConfigError

    if config.validate_every and not validates:
        raise ConfigError(
            f"train.validate_every = {config.validate_every} needs held-out images",
            "Name their tokens with --validation, or set examples.held_out",
        )


def learn(
    draft: "Draft",
    network: "nn.Module",
    examples: "Examples",
    config: "TrainConfig",
    *,
    what: str,
    validate: "Callable[[nn.Module], Mapping[str, float]] | None",
    sample: "Callable[[nn.Module], bytes] | None" = None,
    settings: dict[str, Any],
    loggers: list[str],
    mirror: bool,
    seed: int,
    device: "torch.device",
) -> "TrainState":
    """Train the network in `draft`, to the end; a signal saves the state and ends the process."""
    from vqpipe import distributed
    from vqpipe.data.examples import ExampleStream
    from vqpipe.training.callbacks import HeldOutMetrics, MetricsLog, ProgressCallback, RunReport, SampleSheet
    from vqpipe.training.generator_task import GeneratorTask
    from vqpipe.training.loggers import LOGGERS
    from vqpipe.training.loop import train

    stream = ExampleStream(
        examples,
        seed=seed,
        batch_size=config.global_batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        mirror=mirror,
    )
    with signals.StopAfterStep() as stop, console.ProgressBar() as progress:
        metrics = MetricsLog(draft.path / "metrics.jsonl")
        sheet = None if sample is None else SampleSheet(draft, sample, all_ranks=config.parallel == "fsdp")
        held_out = None if validate is None else HeldOutMetrics(validate, progress)
        sources = [each for each in (sheet, held_out) if each is not None]
        callbacks = [
            metrics,
            *sources,
            *(LOGGERS[name](draft.out, draft.path, settings, metrics) for name in loggers),
            ProgressCallback(progress, config.steps),
            RunReport(draft, metrics, description=what, settings=settings, sources=sources, progress=progress),
        ]
        state = train(
            GeneratorTask(network),
            config,
            stream,
            draft.path,
            seed=seed,
            device=device,
            callbacks=callbacks,
            stop_requested=stop.requested,
        )
        if state.step < config.steps:
            stop.exit()
    return state


def asked(sections: "Mapping[str, Any]", seed: int) -> dict[str, Any]:
    """What goes into the request: the sections, without settings that change nothing, and the seed."""
    from vqpipe.config import to_request

    return {**{name: to_request(section) for name, section in sections.items()}, "seed": seed}
