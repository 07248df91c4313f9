"""What train-generator and train-classifier share: the tokens they read, their run, what watches it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stages import console
from stages.watching import Watcher, train_watched

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vqpipe.artifacts import Artifact, Draft
    from vqpipe.data.examples import Examples, ExamplesConfig
    from vqpipe.reports.page import ReportPage
    from vqpipe.tokenizer import Tokenizer
    from vqpipe.training.config import TrainConfig
    from vqpipe.training.state import TrainState

FREE_KEYS = (
    "log_every",
    "save_every",
    "keep_every",
    "sample_every",
    "max_nonfinite_steps",
    "activation_checkpointing",
    "compile",
    "parallel",
)
"""Settings of [train] that do not change what comes out but for the rounding of sums."""
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


class ExampleWatcher(Watcher):
    """With validations, samples, and the run's page. Rank 0 writes; validating, all ranks measure.

    Args:
        what: one line about the network.
        validate: network -> numbers, on every rank; None where there is nothing to validate on.
        sample: network -> a PNG file of samples; None where it draws none. Sharded, every rank calls it.
    """

    def __init__(
        self,
        draft: "Draft",
        *,
        what: str,
        validate: "Callable[[nn.Module], Mapping[str, float]] | None",
        sample: "Callable[[nn.Module], bytes] | None" = None,
        **options: Any,
    ) -> None:
        super().__init__(draft, **options)
        self.what, self.validation, self.sampler = what, validate, sample
        self.sharded = self.settings["train"]["parallel"] == "fsdp"
        self.sheet: bytes | None = None
        self.sheet_note = ""

    def look(self, step: int, network: "nn.Module") -> None:
        """A sheet of samples, `pictures/step-*.png`."""
        from vqpipe import distributed

        self.page_is_old = True
        if self.sampler is None or not (distributed.is_main() or self.sharded):
            return
        self.sheet = self.sampler(network)
        self.sheet_note = "The same seeds and classes each time."
        if distributed.is_main():
            with self.draft.write(f"pictures/step-{step:08d}.png") as path:
                path.write_bytes(self.sheet)
            for logger in self.loggers:
                logger.show(step, "samples", self.sheet)

    def validate(self, step: int, network: "nn.Module") -> None:
        """Measure on held-out examples."""
        if self.validation is None:
            return
        measured = {f"valid/{name.rpartition('/')[2]}": value for name, value in self.validation(network).items()}
        self.keep({"step": step, "images_seen": step * self.batch_size, **measured})
        numbers = ", ".join(f"{name.removeprefix('valid/')} {value:.4g}" for name, value in measured.items())
        console.say(f"step {step:,}: held-out {numbers}")
        self.page_is_old = True

    def page(self, known: dict[str, Any], footer: str) -> "ReportPage":
        """Numbers, samples, curves."""
        from vqpipe.reports.learning import LearningRun, learning_page

        return learning_page(LearningRun(**known, what=self.what, sheet=self.sheet, sheet_note=self.sheet_note), footer)


def learn(
    draft: "Draft",
    network: "nn.Module",
    examples: "Examples",
    config: "TrainConfig",
    *,
    mirror: bool,
    seed: int,
    device: "torch.device",
    watcher: "Callable[[Any], ExampleWatcher]",
) -> "TrainState":
    """Train the network in `draft`, to the end; a signal saves the state and ends the process."""
    from vqpipe import distributed
    from vqpipe.data.examples import ExampleStream
    from vqpipe.training.generator_task import GeneratorTask

    stream = ExampleStream(
        examples,
        seed=seed,
        batch_size=config.global_batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        mirror=mirror,
    )
    task = GeneratorTask(network)
    return train_watched(draft, task, config, stream, seed=seed, device=device, watcher=watcher)[0]


def asked(sections: "Mapping[str, Any]", seed: int) -> dict[str, Any]:
    """What goes into the request: the sections, without settings that change nothing, and the seed."""
    from vqpipe.config import to_table

    tables = {name: to_table(section) for name, section in sections.items()}
    for key in FREE_KEYS:
        del tables["train"][key]
    return {**tables, "seed": seed}
