"""Interface between the training loop and what it trains: a tokenizer and discriminator, a generator, a classifier.

The loop does what every run needs (resume, schedule, batches, skipped steps, averaging, log, checkpoints, stop); a task
defines the networks and one step of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vqpipe.training.config import TrainConfig
from vqpipe.training.running_metrics import ResultT, RunningMetrics, StepOutput


class KeyedBatch(Protocol):
    """A batch with a name for each of its examples; all other fields are defined by the task and its stream."""

    keys: list[str]
    skipped: dict[int, str]
    """The examples that cannot be used and were replaced, position -> reason."""


BatchT = TypeVar("BatchT", bound=KeyedBatch)
Yielded = TypeVar("Yielded", covariant=True)


class Stream(Protocol[Yielded]):
    """Endless training batches of this rank, from any position of the run."""

    def from_sample(self, images_seen: int) -> Iterator[Yielded]:
        """Batches from global position `images_seen` on. The example at a position does not depend on where the
        iteration started."""


class Task(ABC, Generic[BatchT, ResultT]):
    """One or more networks that train together.

    Args:
        networks: part of a checkpoint -> network; the first, "model", is averaged and published.
        auxiliary: part of a checkpoint -> module that does not train, whose buffers are saved.
    """

    config: TrainConfig
    device: torch.device

    def __init__(self, networks: Mapping[str, nn.Module], auxiliary: Mapping[str, nn.Module] | None = None) -> None:
        self.networks = dict(networks)
        self.auxiliary = dict(auxiliary or {})
        self.optimizers: dict[str, Optimizer] = {}
        """Part of a checkpoint -> optimizer; made by `prepare`."""

    @abstractmethod
    def prepare(self, config: TrainConfig, device: torch.device, average: nn.Module) -> None:
        """Freeze, compile and shard the networks, which are on `device`; make the optimizers.

        `average` is the weight average: a copy of "model", or "model" itself. It is sharded where the network is.

        Raises:
            ConfigError: this task or machine does not offer what `config` sets.
        """

    def connect(self) -> None:
        """Let ranks share gradients; called once the networks hold their initial weights. Default: nothing."""

    @abstractmethod
    def step(self, batch: BatchT, step: int) -> StepOutput[ResultT]:
        """One optimizer step of every network on this rank's share of a global batch. A step whose gradient is not
        finite moves no weight."""

    def after_step(self, output: StepOutput[ResultT]) -> None:
        """Called after each step, e.g. to update a codebook. Must not change any state if `output.skipped`."""

    def running_metrics(self) -> RunningMetrics[ResultT]:
        """The metrics of the log. Default: the means of `StepOutput.values`."""
        return RunningMetrics(self.device)


def mean_over_parts(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each scalar over the parts of a batch."""
    return {name: torch.stack([part[name].float() for part in parts]).mean() for name in parts[0]}
