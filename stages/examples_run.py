"""What train-generator and train-classifier share: train in the draft, and print what was published."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from stages import console, signals
from vqpipe.artifacts import Artifact
from vqpipe.generation.train import ClassifierRecipe, GeneratorRecipe, RunContext, StoredExamples, start_examples_run

RecipeT = TypeVar("RecipeT", GeneratorRecipe, ClassifierRecipe)


def run(
    train: Callable[[RunContext, RecipeT], Artifact | None],
    recipe: RecipeT,
    examples: StoredExamples,
    out: Path,
    *,
    seed: int,
    device: torch.device,
    loggers: Sequence[str],
) -> None:
    """Start or resume the artifact `out`, unless it is published, and train it.

    Raises:
        Interrupted: a signal ended the run after a step; its checkpoint is saved.
    """
    draft = start_examples_run(out, recipe, examples, seed)
    if isinstance(draft, Artifact):
        return console.finished(draft, again=True)
    with draft, signals.StopAfterStep() as stop, console.ProgressBar() as progress:
        context = RunContext(
            draft=draft,
            stored=examples,
            seed=seed,
            device=device,
            loggers=loggers,
            progress=progress,
            stop_requested=stop.requested,
            interruptible=stop.interruptible,
        )
        artifact = train(context, recipe)
        if artifact is None:
            stop.exit()
    return console.finished(artifact)
