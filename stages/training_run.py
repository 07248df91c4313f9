"""What the commands that train share: train in the draft, and print what was published."""

from collections.abc import Callable, Sequence

import torch

from stages import console, signals
from vqpipe.artifacts import Artifact, Draft
from vqpipe.progress import Progress
from vqpipe.training.run import Run


def run(
    draft: Draft | Artifact,
    train: Callable[[Run], Artifact | None],
    *,
    seed: int,
    device: torch.device,
    loggers: Sequence[str],
    progress: Progress,
) -> None:
    """Train in the draft, unless it is an artifact that is published.

    Raises:
        Interrupted: a signal ended the run after a step; its checkpoint is saved.
    """
    if isinstance(draft, Artifact):
        return console.finished(draft, again=True)
    with draft, signals.StopAfterStep() as stop:
        options = Run(
            draft=draft,
            seed=seed,
            device=device,
            loggers=loggers,
            progress=progress,
            stop_requested=stop.requested,
            interruptible=stop.interruptible,
        )
        artifact = train(options)
        if artifact is None:
            stop.exit()
    return console.finished(artifact)
