"""What a row of the log is made of: sums over the steps since the row before, kept on the device."""

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from vqpipe import distributed
from vqpipe.training.history import Row

MadeT = TypeVar("MadeT")


@dataclass
class StepOutput(Generic[MadeT]):
    """What one step of a task gave."""

    values: dict[str, Tensor]
    """Scalars for the log, on the device."""
    bad: Tensor
    """Whether it was skipped since its gradient was not finite: a bool on the device, the same on all ranks."""
    made: MadeT
    """What the task itself wants to see again, after the step and in its window."""


class RunningMetrics(Generic[MadeT]):
    """Sums since the last row of the log; no step waits for them. Skipped steps count for the time alone.

    A checkpoint holds them too (`tensors`), so that the first row after a resume is what it would have been; times
    alone are those of the steps since then.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.clear()

    def clear(self) -> None:
        """Start over, after a row."""
        self.sums: dict[str, Tensor] = {}  # name -> (sum, number of steps), float64[2]
        self.start_clock()

    def start_clock(self) -> None:
        """Steps are timed from now on."""
        self.steps = 0
        self.waited = 0.0
        self.began = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around waiting for a batch."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    @contextmanager
    def apart(self, really: bool = True) -> Iterator[None]:
        """Around what is no step, such as pictures and saving: its time is left out, if `really`."""
        if really and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        began = time.perf_counter()
        yield
        self.began += time.perf_counter() - began if really else 0.0

    def add(self, stepped: StepOutput[MadeT]) -> None:
        """Take in one step of this rank."""
        bad = stepped.bad
        good = (~bad).double()
        for name, value in stepped.values.items():
            pair = torch.stack([torch.where(bad, 0.0, value.detach().double()), good])
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair
        self.steps += 1

    def row(self, images_per_step: int) -> Row:
        """Means over steps and ranks, NaN where every step was skipped, and how fast the steps were."""
        seconds = time.perf_counter() - self.began
        row: Row = {
            **self.numbers(),
            "images_per_second": self.steps * images_per_step / seconds,
            "seconds_per_step": seconds / self.steps,
            "data_wait": self.waited / seconds,
        }
        if self.device.type == "cuda":
            row["memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        return row

    def numbers(self) -> Row:
        """What of a row is about what was trained."""
        return {name: float(total / count) for name, (total, count) in self.totals().items()}

    def totals(self) -> dict[str, Tensor]:
        """The sums of all ranks together, float64[2] each on the CPU. Every rank calls it."""
        names = sorted(self.sums)
        if not names:
            return {}
        summed = distributed.all_reduce_sum(torch.stack([self.sums[name] for name in names])).cpu()
        return dict(zip(names, summed, strict=True))

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the window, over all ranks; nothing right after a row. Every rank calls it."""
        return self.totals()

    def forms(self, names: Collection[str]) -> dict[str, Tensor]:
        """What `tensors` would be like with these names: types and shapes count, values do not."""
        return dict.fromkeys(names, torch.zeros(2, dtype=torch.float64))

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Undoes `tensors`: rank 0 takes over what all ranks had."""
        share = 1.0 if distributed.is_main() else 0.0
        self.sums = {name: tensors[name].to(self.device) * share for name in sorted(tensors)}
