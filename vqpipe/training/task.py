"""What is trained, as the loop sees it: a tokenizer and its discriminator, a generator, a classifier.

The loop does what every run needs (resume, schedule, batches, skipped steps, averaging, log, save, stop); a task says
which networks there are and how one step of them goes.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vqpipe.training.config import TrainConfig
from vqpipe.training.running_metrics import MadeT, RunningMetrics, StepOutput


class Keyed(Protocol):
    """A batch: whatever its task reads, and a name for each of its examples."""

    keys: list[str]


BatchT = TypeVar("BatchT", bound=Keyed)
Yielded = TypeVar("Yielded", covariant=True)


class Stream(Protocol[Yielded]):
    """Endless training batches of this rank, from any position of the run."""

    def from_sample(self, images_seen: int) -> Iterator[Yielded]:
        """Batches from global position `images_seen` on; what stands at a position never depends on where it began."""


class Task(ABC, Generic[BatchT, MadeT]):
    """One or more networks that train together.

    Args:
        networks: part of a checkpoint -> network; the first, "model", is what is averaged and published.
        remembered: part of a checkpoint -> what else is to be remembered, as buffers.
    """

    config: TrainConfig
    device: torch.device

    def __init__(self, networks: Mapping[str, nn.Module], remembered: Mapping[str, nn.Module] | None = None) -> None:
        self.networks = dict(networks)
        self.remembered = dict(remembered or {})
        self.optimizers: dict[str, Optimizer] = {}
        """Part of a checkpoint -> optimizer; `prepare` makes them."""

    @abstractmethod
    def prepare(self, config: TrainConfig, device: torch.device, average: nn.Module) -> None:
        """Make the networks, which are on `device`, ready: freeze, recompute, compile, shard; make the optimizers.

        `average` is the weight average, a copy of "model" as it was, or "model" itself: where a network is sharded
        among ranks, so is its average.

        Raises:
            ConfigError: `config` asks for what this task or machine does not offer.
        """

    def connect(self) -> None:
        """Let ranks share gradients; called once the networks hold what they start from. Default: nothing."""

    @abstractmethod
    def step(self, batch: BatchT, step: int) -> StepOutput[MadeT]:
        """One optimizer step of every network on this rank's share of a global batch. A step whose gradient is not
        finite moves no weight."""

    def after_step(self, stepped: StepOutput[MadeT]) -> None:
        """What follows a step beside gradients; nothing may move where `stepped.bad`. Default: nothing."""

    def window(self) -> RunningMetrics[MadeT]:
        """What collects the numbers of a row of the log. Default: the means of `StepOutput.values`."""
        return RunningMetrics(self.device)


def mean(logged: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Each scalar's mean over the parts of a batch."""
    return {name: torch.stack([part[name].float() for part in logged]).mean() for name in logged[0]}


def autocast(device: torch.device, config: TrainConfig) -> torch.autocast:
    """bf16 autocast where the preset asks for it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
