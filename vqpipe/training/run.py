"""A training run of any task: where it writes, how it reports, and what stops it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from vqpipe.artifacts import Draft
from vqpipe.config import to_table
from vqpipe.progress import SILENT, Progress
from vqpipe.training.callbacks import Callback, MetricsLog, ProgressCallback, RunReport
from vqpipe.training.checkpoint import TrainState
from vqpipe.training.loggers import LOGGERS
from vqpipe.training.loop import train
from vqpipe.training.task import Stream, Task


@dataclass(frozen=True, kw_only=True)
class Run:
    """The options of a run, which do not depend on what it trains."""

    draft: Draft
    seed: int
    device: torch.device
    loggers: Sequence[str] = ()
    """Names of LOGGERS."""
    callbacks: Sequence[Callback] = ()
    """More callbacks, called before the log: a number that one adds to a row is logged."""
    progress: Progress = SILENT
    stop_requested: Callable[[], bool] = lambda: False
    """Whether to save a checkpoint after this step and end; the same run then resumes."""
    interruptible: Callable[[], AbstractContextManager[object]] = nullcontext
    """A context that a request to stop may leave early."""

    def train(
        self, task: Task[Any, Any], recipe: Any, stream: Stream[Any], measures: Sequence[Callback], description: str
    ) -> tuple[TrainState, MetricsLog]:
        """Train in the draft, with its log and its page. Every rank calls it.

        Args:
            recipe: the sections of the preset; `recipe.train` are the settings of the loop.
            measures: callbacks that log numbers and images, and contribute to the page.
            description: one line for the page.
        """
        draft, settings = self.draft, to_table(recipe)
        metrics = MetricsLog(draft.path / "metrics.jsonl")
        page = RunReport(
            draft, metrics, description=description, settings=settings, sources=measures, progress=self.progress
        )
        callbacks = [
            *self.callbacks,
            metrics,
            *measures,
            *(LOGGERS[name](draft.out, draft.path, settings, metrics) for name in self.loggers),
            ProgressCallback(self.progress, recipe.train),
            page,
        ]
        state = train(
            task,
            recipe.train,
            stream,
            draft.path,
            seed=self.seed,
            device=self.device,
            callbacks=callbacks,
            stop_requested=self.stop_requested,
            interruptible=self.interruptible,
        )
        return state, metrics
