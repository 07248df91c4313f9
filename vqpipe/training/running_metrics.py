"""Running metrics of a training run: sums over the steps since the last row of the log, kept on the device."""

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from vqpipe import distributed

Row = dict[str, Any]
"""A row of the log: step, images seen, and numbers by name."""
ResultT = TypeVar("ResultT")


@dataclass
class StepOutput(Generic[ResultT]):
    """What one step of a task returns."""

    values: dict[str, Tensor]
    """Scalars for the log, on the device."""
    skipped: Tensor
    """Whether the step was skipped because its gradient was not finite: bool on the device, the same on all ranks."""
    nonfinite: Tensor
    """The same, or that of another network of the task, such as a discriminator, which then did not move."""
    result: ResultT
    """What the task needs after the step and for its metrics, such as a reconstruction."""


class RunningMetrics(Generic[ResultT]):
    """Means over the steps since the last row of the log. No step waits for them; skipped steps count for time alone.

    A checkpoint holds the sums (`state`), so that the first row after a resume equals that of an uninterrupted run;
    only its times are those of the steps since the resume.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Start over, after a row."""
        self.sums: dict[str, Tensor] = {}  # name -> (sum, number of steps), float64[2]
        self.start_clock()

    def start_clock(self) -> None:
        """Time steps from now on."""
        self.steps = 0
        self.waited = 0.0
        self.began = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    @contextmanager
    def untimed(self, when: bool = True) -> Iterator[None]:
        """Leave the time inside out, if `when` is true: samples, validation, checkpoints."""
        if when and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        began = time.perf_counter()
        yield
        self.began += time.perf_counter() - began if when else 0.0

    def update(self, output: StepOutput[ResultT]) -> None:
        """Add one step of this rank."""
        counted = (~output.skipped).double()
        for name, value in output.values.items():
            pair = torch.stack([torch.where(output.skipped, 0.0, value.detach().double()), counted])
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair
        self.steps += 1

    def row(self, images_per_step: int) -> Row:
        """Means over steps and ranks, NaN where every step was skipped, and the speed of the steps."""
        seconds = time.perf_counter() - self.began
        row: Row = {
            **self.compute(),
            "images_per_second": self.steps * images_per_step / seconds,
            "seconds_per_step": seconds / self.steps,
            "data_wait": self.waited / seconds,
        }
        if self.device.type == "cuda":
            row["memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        return row

    def compute(self) -> Row:
        """The numbers of a row that are not about speed. Every rank calls it."""
        return {name: float(total / count) for name, (total, count) in self.totals().items()}

    def totals(self) -> dict[str, Tensor]:
        """The sums over all ranks, float64[2] each on the CPU. Every rank calls it."""
        names = sorted(self.sums)
        if not names:
            return {}
        summed = distributed.all_reduce_sum(torch.stack([self.sums[name] for name in names])).cpu()
        return dict(zip(names, summed, strict=True))

    def state(self) -> dict[str, Tensor]:
        """The sums over all ranks for a checkpoint; empty right after a row. Every rank calls it."""
        return self.totals()

    def state_like(self, names: Collection[str]) -> dict[str, Tensor]:
        """A template state, for checking names, types and shapes; its values are unused."""
        return dict.fromkeys(names, torch.zeros(2, dtype=torch.float64))

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore a `state`: rank 0 takes the sums of all ranks."""
        share = 1.0 if distributed.is_main() else 0.0
        self.sums = {name: state[name].to(self.device) * share for name in sorted(state)}
